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


def load(folder: Path, progress=None, **settings):
    source = HuggingFace(path=str(folder), dtype="float32", device="cpu", **settings)
    return source.load(progress=progress or Silent()).model


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, rename) -> None:
    tensors = {rename(name): value for name, value in load_file(folder / WEIGHTS).items()}
    tensors.pop(None, None)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path, **settings) -> str:
    with pytest.raises(ModelError) as found:
        load(folder, **settings)
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
    message = refusal(folder)
    assert f"is already quantized ({method}); give the dense checkpoint" in message
    known = method in ("compressed-tensors", "fp8", "mxfp4")
    assert message.endswith("or dequantize it: model.dequantize=true") == known
    if not known:
        assert f"is already quantized ({method}); give the dense checkpoint" in refusal(folder, dequantize=True)


def test_a_quantized_text_part_is_found_too(folder: Path) -> None:
    change_config(folder, text_config={"quantization_config": {"quant_method": "fp8"}})
    assert "is already quantized (fp8)" in refusal(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "is an adapter (adapter_config.json) that names no base model: merge it" in refusal(folder)
    (folder / "config.json").unlink()
    assert "is an adapter" in refusal(folder, adapter="merge")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert "is an adapter (adapter_config.json) of org/base, not a whole model: merge it at loading" in refusal(folder)


def test_an_adapter_is_merged_into_its_base(whole: Path, loaded, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(whole)
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(base, settings)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    notes = Notes()
    model = load(tmp_path / "adapter", notes, adapter="merge")
    state = wrapped.state_dict()
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    change = 3 * state[f"{prefix}.lora_B.default.weight"] @ state[f"{prefix}.lora_A.default.weight"]
    expected = loaded.model.model.layers[1].mlp.down_proj.weight + change
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight, expected)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[untouched], loaded.model.state_dict()[untouched])
    assert type(model).__name__ == "LlamaForCausalLM" and set(model.state_dict()) == set(loaded.model.state_dict())
    assert any(f"is merged into {whole}" in line for line in notes.lines)


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
    transformers.LlamaModel(tiny_config()).save_pretrained(tmp_path / "base")
    assert "is no whole LlamaForCausalLM: it lacks lm_head.weight" in refusal(tmp_path / "base")
    for kind in (transformers.LlamaForSequenceClassification, transformers.LlamaForTokenClassification):
        kind(tiny_config()).save_pretrained(tmp_path / kind.__name__)
        message = refusal(tmp_path / kind.__name__)
        assert f"has a head for other answers than the next token ({kind.__name__}): give the language" in message


def test_another_architecture_is_refused(folder: Path) -> None:
    change_config(folder, model_type="gpt2")
    assert "is no whole GPT2LMHeadModel: it lacks" in refusal(folder)


def test_other_shapes_and_further_layers_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    assert "down_proj.weight has shape (32, 64), LlamaForCausalLM needs (32, 48) (6 such tensors)" in refusal(folder)
    change_config(folder, intermediate_size=64, num_hidden_layers=1)
    assert "LlamaForCausalLM has no place for model.layers.1.input_layernorm.weight" in refusal(folder)


def test_tied_heads_old_buffers_and_other_towers_are_no_reason_to_refuse(loaded, tmp_path: Path) -> None:
    model = small("gpt2", **{**FAMILIES["gpt2"], "vocab_size": 256})
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
    assert "is an encoder (BertForMaskedLM), which sees the tokens after a place too" in refusal(tmp_path / "bert")
    change_config(tmp_path / "bert", architectures=None)  # as in old checkpoints: found by running it
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal language model: changing a later token"):
        Anatomy(load(tmp_path / "bert"))
    change_config(tmp_path / "bert", model_type="distilbert")
    assert "is a distilbert, for which transformers has no causal language model" in refusal(tmp_path / "bert")
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


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert f"{folder} has no tokenizer that can be loaded" in refusal(folder)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(loaded, tmp_path: Path) -> None:
    small("llama", vocab_size=200).save_pretrained(tmp_path / "short")
    loaded.tokenizer.save_pretrained(tmp_path / "short")
    assert "has a tokenizer of 256 tokens and a model of 200: they do not belong together" in refusal(
        tmp_path / "short"
    )


def test_an_added_token_without_a_row_is_said(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    notes = Notes()
    load(folder, notes)
    assert notes.lines[-1] == "the model has no row for the tokens <extra>: text must not hold them"


def test_an_fp8_checkpoint_is_dequantized_on_request(folder: Path) -> None:
    layer = "model.layers.1.mlp.down_proj"
    tensors = load_file(folder / WEIGHTS)
    dense = tensors[f"{layer}.weight"]
    scales = dense.abs().reshape(2, 16, 4, 16).amax(dim=(1, 3)) / 448
    spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    tensors[f"{layer}.weight"] = (dense / spread).to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight_scale_inv"] = scales
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    others = [f"model.layers.{block}.self_attn" for block in range(2)] + ["model.layers.0", "lm_head"]
    others += [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj")]
    section = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": others}
    change_config(folder, quantization_config=section)
    assert "is already quantized (fp8)" in refusal(folder)
    notes = Notes()
    model = load(folder, notes, dequantize=True)
    assert torch.equal(model.get_submodule(layer).weight, tensors[f"{layer}.weight"].float() * spread)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
    assert "fp8 weights are dequantized; what comes out is not the dense original" in notes.lines
    model.save_pretrained(folder.parent / "dense")
    assert weights_hash(load_plain(folder.parent / "dense")) == weights_hash(model)


def load_plain(folder: Path):
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_tokenizer_that_needs_code_is_one_line(folder: Path, capfd) -> None:
    (folder / "tokenizer.json").unlink()
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "tokenization_own.py").write_text("raise SystemExit('it ran')\n")
    assert "has a tokenizer that needs its own Python code (auto_map in tokenizer_config.json)" in refusal(folder)
    assert "y/N" not in "".join(capfd.readouterr())
