"""Checkpoints that must not be used as they are: each is refused in one line that says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evosweep.core.errors import ModelError, SettingError
from evosweep.core.events import Silent
from evosweep.models.anatomy import Anatomy
from evosweep.models.checkpoint import check_length
from evosweep.models.load import HuggingFace, Random, weights_hash
from evosweep.testing.tiny import tiny_config
from tests.models.test_anatomy import FAMILIES, small

WEIGHTS = "model.safetensors"


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def load(folder: Path, progress=None):
    return HuggingFace(path=str(folder), dtype="float32", device="cpu").load(progress=progress or Silent()).model


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, rename) -> None:
    tensors = {rename(name): value for name, value in load_file(folder / WEIGHTS).items()}
    tensors.pop(None, None)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as found:
        load(folder)
    message = str(found.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path, loaded, capfd) -> None:
    trace = tmp_path / "it_ran"
    code = f"open({str(trace)!r}, 'w')\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(code)
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change_config(folder, auto_map=own)
    tokenizer = folder / "tokenizer_config.json"
    own_tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), **own_tokenizer}))
    notes = Notes()
    assert weights_hash(load(folder, notes)) == weights_hash(loaded.model)  # transformers has this model itself
    assert any("is not run; transformers' own llama is used" in line for line in notes.lines)
    change_config(folder, model_type="own")
    assert "needs its own Python code (auto_map in config.json), which is never run" in refusal(folder)
    assert not trace.exists() and "y/N" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantized_checkpoints_are_refused_by_method(folder: Path, section: dict, method: str) -> None:
    change_config(folder, quantization_config=section)
    assert f"is already quantized ({method}); give the dense checkpoint" in refusal(folder)


def test_a_quantized_text_part_is_found_too(folder: Path) -> None:
    change_config(folder, text_config={"quantization_config": {"quant_method": "fp8"}})
    assert "is already quantized (fp8)" in refusal(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "is an adapter (adapter_config.json), not a whole model" in refusal(folder)
    (folder / "config.json").unlink()
    assert "is an adapter" in refusal(folder)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda name: None if name == DOWN else name, f"it lacks {DOWN} (weights"),
        (lambda name: None if ".layers.1." in name else name, "model.layers.1.input_layernorm.weight"),
        (lambda name: f"net.{name}", "it lacks lm_head.weight, model.embed_tokens.weight"),
        (lambda name: name.replace("lm_head", "score"), "it lacks lm_head.weight (weights"),
    ],
    ids=["tensor", "layer", "renamed", "head"],
)
def test_missing_weights_are_named_not_made_up(folder: Path, rename, named: str) -> None:
    change_weights(folder, rename)
    assert named in refusal(folder)


def test_a_base_model_and_a_classifier_are_refused(tmp_path: Path) -> None:
    for number, kind in enumerate([transformers.LlamaModel, transformers.LlamaForSequenceClassification]):
        kind(tiny_config()).save_pretrained(tmp_path / str(number))
        assert "is no whole LlamaForCausalLM: it lacks lm_head.weight" in refusal(tmp_path / str(number))


def test_another_architecture_is_refused(folder: Path) -> None:
    change_config(folder, model_type="gpt2")
    assert "is no whole GPT2LMHeadModel: it lacks" in refusal(folder)


def test_other_shapes_and_further_layers_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    assert "down_proj.weight has shape (32, 64), LlamaForCausalLM needs (32, 48) (6 such tensors)" in refusal(folder)
    change_config(folder, intermediate_size=64, num_hidden_layers=1)
    assert "LlamaForCausalLM has no place for model.layers.1.input_layernorm.weight" in refusal(folder)


def test_tied_heads_old_buffers_and_other_towers_are_no_reason_to_refuse(loaded, tmp_path: Path) -> None:
    model = small("gpt2", **FAMILIES["gpt2"])
    model.save_pretrained(tmp_path / "tied")
    loaded.tokenizer.save_pretrained(tmp_path / "tied")
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(tmp_path / "tied" / WEIGHTS).items()
    }
    tensors.pop("lm_head.weight", None)
    old = {"h.0.attn.masked_bias": torch.tensor(-1e4), "h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    tower = {"vision_tower.patch.weight": torch.ones(2, 2)}
    save_file({**tensors, **old, **tower}, tmp_path / "tied" / WEIGHTS, metadata={"format": "pt"})
    notes = Notes()
    assert weights_hash(load(tmp_path / "tied", notes)) == weights_hash(model)
    assert notes.lines[-1] == "not loaded, as text does not need them: vision_tower.patch.weight"


def test_encoders_and_encoder_decoders_are_refused(loaded, tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=2, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    loaded.tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal language model: changing a later token"):
        Anatomy(load(tmp_path / "bert"))
    t5 = transformers.T5Config(vocab_size=256, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert "is an encoder-decoder (t5), not a decoder" in refusal(tmp_path / "t5")


def test_windows_longer_than_learned_positions_are_refused() -> None:
    for kind in ("gpt2", "opt"):
        model = small(kind, **FAMILIES[kind])
        assert check_length(model, 64) is None
        with pytest.raises(SettingError, match=r"^tokens\.seq_len must be at most 64, .* got 65"):
            check_length(model, 65)
    llama = small("llama", max_position_embeddings=64)
    assert check_length(llama, 64) is None
    assert check_length(llama, 65) == "tokens.seq_len=65 is longer than the 64 positions that this model was made for"


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "cpu:7", "cuda:99", "", 7, None])
def test_devices_that_are_not_there_are_refused(device) -> None:
    with pytest.raises(SettingError, match=r"^device must be one of auto, cpu"):
        HuggingFace(path="x", device=device)


@pytest.mark.parametrize("seed", [2**70, 2**63, -1, 1.5, True])
def test_seeds_out_of_range_are_refused(seed) -> None:
    with pytest.raises(SettingError, match=r"^seed must be an integer from 0 to 9223372036854775807"):
        Random(name="r", config=tiny_config, seed=seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 255}, r"^model\.config\.vocab_size must be at least 256"),
        ({"vocab_size": -1}, r"model\.config"),
        ({"num_attention_heads": 0}, r"model\.config"),
        ({"hidden_size": -4}, r"model\.config"),
        ({"hidden_size": "wide"}, r"model\.config"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers|blocks"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers|blocks"),
        ({"hidden_size": 2**22, "intermediate_size": 2**22}, r"model\.config describes a model of .* GB"),
        ({"num_key_value_heads": 3}, r"LlamaForCausalLM does not run|model\.config"),
        ({"head_dim": 7}, r"LlamaForCausalLM does not run|model\.config"),
    ],
)
def test_configs_out_of_range_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises((ModelError, SettingError), match=message) as found:
        Anatomy(Random(name="r", config=lambda: tiny_config(**changes), device="cpu").load(progress=Silent()).model)
    assert "\n" not in str(found.value)
