"""Checkpoints of many kinds on the command line: compressed as a whole, or refused in one line."""

import json
from pathlib import Path

import mlflow
import pytest
import torch
import transformers

from evosweep.models.load import byte_tokenizer
from evosweep.testing.tiny import tiny_config
from tests.cli import TINY, evosweep, workplace
from tests.models.seeing import save_seeing

OURS = [setting for setting in TINY if setting != "model=tiny"]
OURS += ["model=hf", "model.dtype=float32", "model.device=cpu", "compressor.bits=[2,4]", "budget.as_uniform=2"]
OURS += ["search.generations=1", "sampler=uniform", "report=none", "compressor.group=auto", "store.propagate=null"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("kinds")) as folder:
        yield folder


def mixture(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    shared = {"intermediate_size": 128, "shared_expert_intermediate_size": 96}
    config = transformers.Qwen2MoeConfig(vocab_size=256, max_position_embeddings=256, **sizes, **experts, **shared)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def result_of(here: Path, name: str) -> tuple[dict, Path]:
    path = max((here / "runs" / name).glob("*/result.json"), key=lambda found: found.stat().st_mtime)
    return json.loads(path.read_text()), path.parent


def test_a_model_of_images_and_text_is_compressed_and_loads_again(here: Path, capsys) -> None:
    folder = save_seeing("llava", here / "llava")
    assert evosweep(*OURS, f"model.path={folder}", "name=seeing", "export=dense", "tracking=none") == 0
    row, run = result_of(here, "seeing")
    assert row["metrics"]["coverage"] == 1.0 and row["left_out"] == []
    assert "the 2 blocks of model.language_model.layers are compressed; as they are: model.vision_tower" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert type(transformers.AutoProcessor.from_pretrained(run / "model")).__name__ == "LlavaProcessor"
    model = transformers.AutoModelForImageTextToText.from_pretrained(run / "model")
    before = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert len(changed) == 14 and all(name.startswith("model.language_model.layers.") for name in changed)


def test_what_units_leave_out_of_a_mixture_is_asked_for_and_logged(here: Path, capsys) -> None:
    folder = mixture(here / "mixture")
    settings = [*OURS, f"model.path={folder}", "name=mixed", "export=none", "units.include=[no_such]"]
    assert evosweep(*settings) == 2
    assert "units.include must be patterns that match a layer" in capsys.readouterr().err
    assert evosweep(*settings[:-1], "units.coverage=0.9", f"tracking.uri=sqlite:///{here}/mlflow.db") == 0
    row, _ = result_of(here, "mixed")
    client = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db")
    run = client.get_run(row["mlflow_run"])
    assert run.data.metrics["coverage"] == pytest.approx(row["metrics"]["coverage"], abs=1e-6)
    assert float(run.data.tags["coverage"]) == run.data.metrics["coverage"]
    assert {kind["kind"] for kind in row["left_out"]} >= {"mlp.gate", "mlp.shared_expert_gate"}
    assert "of the blocks' weights; as they are:" in " ".join(capsys.readouterr().out.split())


def test_a_classifier_is_one_line_and_leaves_nothing_behind(here: Path, capsys) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=256, **sizes)
    transformers.LlamaForSequenceClassification(config).save_pretrained(here / "classifier")
    assert evosweep(*OURS, f"model.path={here / 'classifier'}", "name=classified") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "model.path" in line]
    assert len(lines) == 1 and "has a head for other answers than the next token" in lines[0]
    assert not (here / "runs" / "classified").exists()


def test_a_budget_may_be_the_number_of_a_level_that_is_not_whole(here: Path) -> None:
    others = ("compressor.bits", "compressor.group", "budget.as_uniform", "sampler=")
    settings = [setting for setting in OURS if not setting.startswith(others)]
    transformers.LlamaForCausalLM(tiny_config()).save_pretrained(here / "llama")
    byte_tokenizer().save_pretrained(here / "llama")
    settings += [f"model.path={here / 'llama'}", "name=fraction", "export=none", "tracking=none", "sampler=uniform"]
    assert evosweep(*settings, "compressor=gguf", "compressor.types=[Q4_K,Q8_0]", "budget.as_uniform=4.5") == 0
    row, _ = result_of(here, "fraction")
    assert row["metrics"]["bits_per_weight"] == 4.5  # IQ4_NL for rows of 32: 18 bytes for 32 weights
