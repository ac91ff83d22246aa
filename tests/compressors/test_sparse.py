from itertools import pairwise

import numpy as np
import pytest
import torch

from evosweep.compressors.formats import bitmask
from evosweep.compressors.magnitude import Magnitude
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.compressors.wanda import Wanda
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by, statistics_of

SHAPES = {"small": (8, 32), "large": (24, 32)}


class SparseContract(CompressorContract):
    def test_exactly_as_many_weights_are_kept_as_planned(self, plans, payloads) -> None:
        for name, ladder in plans.items():
            for plan in ladder:
                tensors = payloads[name][plan.name].tensors
                assert len(tensors["values"]) == plan.spec.kept
                assert int((payloads[name][plan.name].weight != 0).sum()) <= plan.spec.kept


class TestSparseGPT(SparseContract):
    def make(self) -> SparseGPT:
        return SparseGPT(sparsity=0.5, window=0.3, mask_block=8, column_block=4)


class TestWanda(SparseContract):
    def make(self) -> Wanda:
        return Wanda(sparsity=0.5, window=0.3)


class TestMagnitude(SparseContract):
    def make(self) -> Magnitude:
        return Magnitude(sparsity=0.6, window=0.2, step=16)


def sparsegpt_float64(weight, gram, *, kept: int, damping: float, block: int):
    """SparseGPT straight from the paper (Algorithm 1 without lazy updates), one column at a time in float64."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy().copy()
    gram += damping * np.diag(gram).mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    columns, mask = weight.shape[1], np.zeros(weight.shape, dtype=bool)
    for column in range(columns):
        if column % block == 0:
            stop = min(column + block, columns)
            scores = (weight[:, column:stop] / np.diag(upper)[column:stop]) ** 2
            quota = kept * stop // columns - kept * column // columns
            best = np.argsort(-scores, axis=None)[:quota]
            mask[:, column:stop].flat[best] = True
            part = np.zeros(scores.shape, dtype=bool)
            part.flat[best] = True
            mask[:, column:stop] = part
        settled = np.where(mask[:, column], weight[:, column], 0)
        error = (weight[:, column] - settled) / upper[column, column]
        weight[:, column] = settled
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return weight, mask


@pytest.mark.parametrize(("sparsity", "block"), [(0.5, 16), (0.75, 64), (0.25, 24)])
def test_sparsegpt_equals_a_float64_reference(sparsity: float, block: int) -> None:
    weight, gram = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)), gram_of(64)
    compressor = SparseGPT(sparsity=sparsity, window=0.25, step=192, mask_block=block, column_block=8)
    plans = compressor.plan({"a": (48, 64)})
    payloads = compressor.compress({"a": weight}, statistics_of(gram), plans)["a"]
    for plan in plans["a"]:
        expected, mask = sparsegpt_float64(weight, gram, kept=plan.spec.kept, damping=0.01, block=block)
        made = payloads[plan.name].weight
        assert ((made != 0).numpy() == mask).mean() >= 0.99
        errors = [
            float(((difference @ gram.double()) * difference).sum())
            for difference in ((weight - made).double(), weight.double() - torch.from_numpy(expected))
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.01, abs=1e-3)


def test_compensation_beats_masks_alone() -> None:
    weight, gram = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), gram_of(64, mixing=2.0)
    errors = {}
    for compressor in (SparseGPT(window=0), Wanda(window=0), Magnitude(window=0)):
        (payload,) = made_by(compressor, {"a": weight}, gram)["a"].values()
        difference = weight - payload.weight
        errors[type(compressor).__name__] = float(((difference @ gram) * difference).sum())
    assert errors["SparseGPT"] < 0.95 * min(errors["Wanda"], errors["Magnitude"])


def test_all_units_step_by_the_same_number_of_weights() -> None:
    plans = SparseGPT(sparsity=0.5, window=0.3).plan(SHAPES)
    steps = {b.cost - a.cost for ladder in plans.values() for a, b in pairwise(ladder)}
    assert steps == {64 * bitmask.VALUE_BITS}
    assert all(any(plan.nominal.number == 0.5 for plan in ladder) for ladder in plans.values())
    assert len(plans["small"]) == 3 and len(plans["large"]) == 7


def test_names_say_the_sparsity() -> None:
    assert [plan.name for plan in Magnitude(sparsity=0.5, window=0.25).plan(SHAPES)["small"]] == ["75%", "50%", "25%"]


def test_a_step_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(SettingError, match=r"step"):
        Magnitude(sparsity=1.0, window=0.0, step=1000).plan(SHAPES)


def test_wanda_keeps_as_many_in_every_row() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    compressor = Wanda(sparsity=0.5, window=0.1, step=20)
    for plan in (plans := compressor.plan({"a": (8, 32)}))["a"]:
        made = compressor.compress({"a": weight}, statistics_of(gram_of(32)), plans)["a"][plan.name].weight
        counts = (made != 0).sum(1)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    "settings", [{"sparsity": 1.5}, {"window": -0.1}, {"step": 0}, {"damping": 0}, {"mask_block": 0}]
)
def test_bad_settings_are_named(settings: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        SparseGPT(**settings)


@pytest.mark.parametrize("kind", [SparseGPT, Wanda, Magnitude])
def test_patterns_hold_in_every_group_of_a_row(kind) -> None:
    compressor = kind(patterns=["2:4", "1:8"])
    plans = compressor.plan(SHAPES)
    assert [plan.name for plan in plans["large"]] == ["1:8", "2:4", "dense"]
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    payloads = compressor.compress(weights, statistics_of(gram_of(32)), plans)
    for name in SHAPES:
        for level, few, many in (("2:4", 2, 4), ("1:8", 1, 8)):
            kept = payloads[name][level].weight.view(-1, many) != 0
            assert (kept.sum(dim=1) == few).all()
        assert torch.allclose(payloads[name]["dense"].weight, weights[name], atol=2e-3)


@pytest.mark.parametrize(
    ("pattern", "message"), [("4:4", "0 < N < M.*'4:4'"), ("2", "N:M"), ("5:3", "N:M"), ("1:5", "2 layers .*32")]
)
def test_bad_patterns_are_said(pattern: str, message: str) -> None:
    with pytest.raises(SettingError, match=f"patterns.*({message})"):
        Magnitude(patterns=[pattern]).plan(SHAPES)
