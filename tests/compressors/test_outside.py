"""Compressors, formats and statistics that are not evosweep's own: found by their paths, no file of ours edited."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from evosweep.compressors.base import Compressor, Statistics
from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.events import Silent
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.packed import PackedSafetensors
from evosweep.fitness.kl import KL
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.statistics.output_gradient_square import measure_model
from evosweep.store.store_plan import plan_store
from evosweep.testing.compressor import CompressorContract
from tests.compressors.gradient_rows import LARGEST_INPUT, GradientRows
from tests.compressors.low_rank import LowRank


class TestLowRank(CompressorContract):
    def make(self) -> LowRank:
        return LowRank(base=GPTQ(bits=[2, 4], group=16), ranks=[2])

    def test_a_low_rank_term_lowers_the_error(self, weights, plans, payloads) -> None:
        for name, weight in weights.items():
            for payload in payloads[name].values():
                base = payload.parts["base"]
                assert (weight - payload.weight).norm() < (weight - base.weight).norm()


class TestGradientRows(CompressorContract):
    def make(self) -> GradientRows:
        return GradientRows()

    def measured(self, compressor: Compressor, gram: torch.Tensor) -> Statistics:
        squares = {f"layer_{n}": torch.arange(float(shape[0])) for n, shape in enumerate(self.shapes)}
        return Statistics({"output_gradient_square": squares, LARGEST_INPUT: torch.ones(())})


@pytest.fixture(scope="module")
def wrapped(anatomy, splits) -> LevelStore:
    config = {
        "_target_": "tests.compressors.low_rank.LowRank",
        "base": {"_target_": "evosweep.compressors.gptq.GPTQ", "bits": [2, 4], "group": 16},
        "ranks": [8],
    }
    plan = plan_store(anatomy, instantiate(config))
    return StoreBuilder().open(plan, splits["calibration"], model_name="tiny")


def test_a_wrapper_is_stored_scored_and_exported(anatomy, splits, loaded, wrapped, tmp_path) -> None:
    unit = wrapped.units[0]
    assert unit.level_names == ("2bit+r8", "4bit+r8")
    stored = wrapped.payload(unit.name, "2bit+r8")
    tensors = stored.tensors()
    assert set(tensors) == {"left", "right", "base/codes", "base/scales", "base/zeros"}
    assert sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values()) == unit.levels[0].cost
    evaluator = Evaluator(anatomy=anatomy, store=wrapped, splits=splits)
    genome = np.zeros(len(wrapped.units), dtype=np.int64)
    score = evaluator.score(genome[None], split="search", windows=[0], fitness=[KL()])["kl"]
    slots = [slot for slot in anatomy.slots if slot.name in {unit.name for unit in wrapped.units}]
    with replaced_weights(slots, {slot.name: wrapped.weight(slot.name, "2bit+r8") for slot in slots}):
        alone = evaluator.score(None, split="search", windows=[0], fitness=[KL()])["kl"]
    assert float(score[0]) == pytest.approx(float(alone[0]), rel=1e-4)
    facts = PackedSafetensors().export(
        genome,
        problem=Budget(bits_per_weight=40).problem(wrapped.units, fixed_bits=wrapped.fixed_bits),
        evaluator=evaluator,
        loaded=LoadedModel("tiny", loaded.model, loaded.tokenizer),
        folder=tmp_path / "model",
    )
    assert facts["max_logit_difference"] < 1e-4
    index = json.loads((tmp_path / "model" / "packed.json").read_text())
    assert index["units"][unit.name]["parts"]["base"]["format"] == "evosweep.compressors.formats.grouped_int"


def keep(outputs: dict[str, torch.Tensor], name: str, module, args, output: torch.Tensor) -> None:
    outputs[name] = output


def plain_gradients(anatomy, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what ``measure_model`` should: the whole model with gradients, one window at a time."""
    totals: dict[str, torch.Tensor] = {}
    for window in windows:
        outputs: dict[str, torch.Tensor] = {}
        handles = [slot.module.register_forward_hook(partial(keep, outputs, slot.name)) for slot in anatomy.slots]
        embeddings = anatomy.model.get_input_embeddings()(window[None]).detach().requires_grad_()
        logits = anatomy.model(inputs_embeds=embeddings, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:], reduction="sum")
        found = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, found, strict=True):
            totals[name] = totals.get(name, 0) + gradient[0].square().sum(dim=0)
        for handle in handles:
            handle.remove()
    return {name: total / windows.numel() for name, total in totals.items()}


@pytest.mark.parametrize("batch_tokens", [1, 16 * 32])
def test_gradients_are_those_of_the_whole_model(anatomy, splits, batch_tokens: int) -> None:
    windows = torch.from_numpy(splits["calibration"].windows[:5])
    found = measure_model(anatomy, windows, batch_tokens=batch_tokens, progress=Silent())
    expected = plain_gradients(anatomy, windows)
    assert set(found) == {slot.name for slot in anatomy.slots} == set(expected)
    for name, value in found.items():
        assert float(value.max()) > 0
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-7 * float(value.max()))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in anatomy.model.parameters())


def test_a_compressor_by_target_gets_gradients_and_a_statistic_of_its_own(anatomy, splits) -> None:
    compressor = instantiate({"_target_": "tests.compressors.gradient_rows.GradientRows"})
    store = StoreBuilder(propagate=0).open(plan_store(anatomy, compressor), splits["calibration"], model_name="tiny")
    windows = torch.from_numpy(splits["calibration"].windows)
    squares = measure_model(anatomy, windows, batch_tokens=4096, progress=Silent())
    for unit in store.units:
        kept = store.weight(unit.name, "50%").abs().sum(dim=1) > 0
        rows = len(kept)
        assert set(kept.nonzero().flatten().tolist()) == set(squares[unit.name].topk(rows // 2).indices.tolist())
