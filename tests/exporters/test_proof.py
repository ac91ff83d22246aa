"""An export is proved against the model's own forward, so that what is scored wrongly is never called done."""

import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.errors import ExportError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.models import contexts
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel
from tests.evaluate.test_any_model import evaluator_of
from tests.models.beside import CHAIN, WHOLE, made
from tests.models.test_dropping import NoTokenizer

FAMILIES = ("gemma4", "gemma4_shared", "gemma3n", "deepseek_v4", "bloom", "rwkv", "mamba2", "recurrent_gemma")


def exported(evaluator: Evaluator, exporter, folder) -> float:
    problem = Budget(bits_per_weight=15).problem(evaluator.store.units, fixed_bits=evaluator.store.fixed_bits)
    genome = np.random.default_rng(0).integers(0, [len(unit.levels) for unit in problem.units])
    loaded = LoadedModel("any", evaluator.anatomy.model, NoTokenizer())
    facts = exporter.export(genome, problem=problem, evaluator=evaluator, folder=folder, loaded=loaded)
    return facts["max_logit_difference"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_scored_is_what_reloads(family: str, tmp_path) -> None:
    evaluator = evaluator_of(Anatomy(made((CHAIN | WHOLE)[family]())), GPTQ(bits=[2, 4], group=4))
    assert exported(evaluator, DenseSafetensors(), tmp_path / "dense") < 1e-5
    assert exported(evaluator, PackedSafetensors(), tmp_path / "packed") < 1e-5


@pytest.mark.parametrize("family", ["mamba2", "deepseek_v4"])
def test_streams_in_fp32_of_a_bfloat16_model(family: str, tmp_path) -> None:
    made((CHAIN | WHOLE)[family]()).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    evaluator = evaluator_of(Anatomy(model), GPTQ(bits=[2, 4], group=4))
    assert exported(evaluator, DenseSafetensors(), tmp_path / "dense") < 1e-2
    assert exported(evaluator, PackedSafetensors(), tmp_path / "packed") < 1e-2


def test_a_score_of_another_model_is_not_exported(monkeypatch, tmp_path) -> None:
    """Scoring that gives every window the per-layer inputs of the same tokens, and a check that does not see it."""
    monkeypatch.setattr("evosweep.models.anatomy.why_not_block_by_block", lambda chain, expected: "")
    monkeypatch.setattr("evosweep.models.anatomy.not_by_row", lambda chain, slots: {})
    monkeypatch.setattr(contexts, "_part", lambda one, two: contexts.Part())
    evaluator = evaluator_of(Anatomy(made(CHAIN["gemma4"]())), GPTQ(bits=[2, 4], group=4))
    with pytest.raises(
        ExportError, match=r"the model itself, .*, does not give the logits that were scored: .*differs"
    ):
        exported(evaluator, DenseSafetensors(), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
