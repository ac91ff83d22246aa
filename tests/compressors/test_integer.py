import numpy as np
import pytest
import torch

from evosweep.compressors import compensate
from evosweep.compressors.compensate import factorize
from evosweep.compressors.formats import grouped_int
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.payload import layer_error
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparse_gptq import SparseGPTQ
from evosweep.core.errors import SettingError, StoreError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by


class TestGPTQ(CompressorContract):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 3, 4, 8], group=8)

    def reference(self, weight, gram, level):
        return gptq_weight(weight, gram, self.make(), level.spec.bits)


class TestSymmetricGPTQ(TestGPTQ):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 4], group=16, symmetric=True)


class TestOrderedGPTQ(TestGPTQ):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 3, 5], group=8, order="activation", column_block=5)


class TestSearchedGPTQ(TestGPTQ):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 3, 5], group=8, grid="mse", grid_steps=6)


class TestOrderedAndSearchedGPTQ(TestGPTQ):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 4], group=16, order="activation", grid="mse", grid_norm=2, symmetric=True)


class TestRoundToNearest(CompressorContract):
    def make(self) -> RoundToNearest:
        return RoundToNearest(bits=[2, 3, 5, 6], group=16)

    def reference(self, weight, gram, level):
        compressor, top, weight = self.make(), 2**level.spec.bits - 1, weight.numpy()
        settings = search_settings(compressor.search.searches[-1])
        made = []
        for block in np.split(weight, weight.shape[1] // compressor.group, axis=1):
            scale, zero = grid_float64(block, top=top, symmetric=compressor.symmetric, **settings)[:, :, None]
            made.append((np.clip(np.round(block / scale + zero), 0, top) - zero) * scale)
        return torch.from_numpy(np.concatenate(made, axis=1))


class TestSearchedRounding(TestRoundToNearest):
    def make(self) -> RoundToNearest:
        return RoundToNearest(bits=[2, 3, 5, 6], group=16, grid="mse")


class TestSymmetricRounding(TestRoundToNearest):
    def make(self) -> RoundToNearest:
        return RoundToNearest(bits=[2, 4], group=8, symmetric=True, grid="mse", grid_norm=1.5, grid_least=0.6)


class TestWholeRows(CompressorContract):
    def make(self) -> RoundToNearest:
        return RoundToNearest(bits=[3, 4], group=None)


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_survive_packing(width: int) -> None:
    codes = torch.randint(0, 2**width, (7, 13), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    planes = grouped_int.pack(codes, width)
    assert planes.shape == (width, -(-91 // 8))
    assert torch.equal(grouped_int.unpack(planes, width, 91).view(7, 13), codes)


def grid_float64(block, *, top: int, symmetric: bool, factors=(1.0,), norm: float = 2.4):
    """Scale and zero of each row of a group: those of the part of its range that rounds it best."""
    best, found = np.full(len(block), np.inf), None
    for factor in factors:
        low, high = factor * np.minimum(block.min(1), 0), factor * np.maximum(block.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        empty = low == high
        low, high = np.where(empty, -1, low), np.where(empty, 1, high)
        scale = ((high - low) / top).astype(np.float16).astype(np.float64)
        zero = np.full(len(scale), (top + 1) / 2) if symmetric else np.clip(np.round(-low / scale), 0, top)
        codes = np.clip(np.round(block / scale[:, None] + zero[:, None]), 0, top)
        error = (np.abs((codes - zero[:, None]) * scale[:, None] - block) ** norm).sum(1)
        better = error < best
        best = np.where(better, error, best)
        new = np.stack([scale, zero])
        found = new if found is None else np.where(better, new, found)
    return found


def search_settings(search) -> dict:
    """What ``grid_float64`` is told of a compressor's search; nothing without one."""
    return {} if search is None else {"factors": search.factors, "norm": search.norm}


def gptq_float64(weight, gram, *, width: int, group: int, damping: float, symmetric: bool, order=None, **search):
    """GPTQ straight from the paper (Algorithm 1 without its batching), one column at a time in float64."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy().copy()
    gram += damping * np.diag(gram).mean() * np.eye(len(gram))
    top, codes = 2**width - 1, np.zeros_like(weight)
    columns = range(weight.shape[1])
    grids = {}
    if order == "activation":
        grids = {
            start: grid_float64(weight[:, start : start + group], top=top, symmetric=symmetric, **search)
            for start in range(0, weight.shape[1], group)
        }
        columns = np.argsort(-np.diag(gram), kind="stable")
    permutation = list(columns)
    upper = np.linalg.cholesky(np.linalg.inv(gram[permutation][:, permutation])).T
    made = np.zeros_like(weight)
    for place, column in enumerate(permutation):
        start = column // group * group
        if start not in grids:
            grids[start] = grid_float64(weight[:, start : start + group], top=top, symmetric=symmetric, **search)
        scale, zero = grids[start]
        codes[:, column] = np.clip(np.round(weight[:, column] / scale + zero), 0, top)
        made[:, column] = (codes[:, column] - zero) * scale
        error = (weight[:, column] - made[:, column]) / upper[place, place]
        weight[:, permutation[place + 1 :]] -= np.outer(error, upper[place, place + 1 :])
    return codes, made


def gptq_weight(weight, gram, compressor: GPTQ, width: int) -> torch.Tensor:
    """The float64 version's weight: of the grids that a compressor tries, the one with the lowest error."""
    settings = {"width": width, "group": compressor.group, "damping": compressor.damping}
    settings |= {"symmetric": compressor.symmetric, "order": compressor.order}
    made = []
    for search in compressor.search.searches:
        made.append(torch.from_numpy(gptq_float64(weight, gram, **settings, **search_settings(search))[1]))
    return min(made, key=lambda one: layer_error(weight - one, gram))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("width", "group", "block"), [(2, 16, 8), (3, 16, 128), (4, 32, 5), (8, 64, 32)])
def test_gptq_equals_a_float64_reference(width: int, group: int, block: int, symmetric: bool) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    gram = gram_of(64)
    compressor = GPTQ(bits=[2, 3, 4, 5, 8], group=group, symmetric=symmetric, column_block=block)
    payload = made_by(compressor, {"a": weight}, gram)["a"][f"{width}bit"]
    codes = grouped_int.unpack(payload.tensors["codes"], width, weight.numel()).view(48, 64).numpy()
    expected, _ = gptq_float64(weight, gram, width=width, group=group, damping=0.01, symmetric=symmetric)
    assert (codes == expected).mean() >= 0.99


def test_gptq_beats_rounding_where_inputs_have_structure() -> None:
    weight, gram = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), gram_of(64)
    errors = []
    for compressor in (GPTQ(bits=[3], group=16), RoundToNearest(bits=[3], group=16)):
        difference = weight - made_by(compressor, {"a": weight}, gram)["a"]["3bit"].weight
        errors.append(float(((difference @ gram) * difference).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_dead_inputs_get_zero_weights_and_do_no_harm() -> None:
    gram = gram_of(32)
    gram[5], gram[:, 5] = 0, 0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    made = made_by(GPTQ(bits=[4], group=32), {"a": weight}, gram)["a"]["4bit"].weight
    assert torch.isfinite(made).all() and float(made[:, 5].abs().max()) == 0


def test_the_factor_is_what_the_paper_asks() -> None:
    gram = gram_of(16)
    upper = factorize(gram, damping=0.01).upper
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(16)
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped), atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_singular_second_moments_are_damped_until_they_factorize() -> None:
    one = torch.ones(16, 16)
    assert torch.isfinite(factorize(one, damping=1e-9).upper).all()


def test_second_moments_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(StoreError, match=r"calibration"):
        factorize(torch.full((4, 4), float("nan")), damping=0.01)


def test_all_zero_weights_stay_zero() -> None:
    made = made_by(GPTQ(bits=[2, 3], group=8), {"a": torch.zeros(4, 16)}, gram_of(16))["a"]
    assert all(float(payload.weight.abs().max()) == 0 for payload in made.values())


def test_three_bits_in_groups_of_64_cost_what_they_take() -> None:
    ((plan,),) = GPTQ(bits=[3], group=64).plan({"a": (576, 576)}).values()
    assert plan.cost / 576**2 == pytest.approx(3 + (16 + 3) / 64)
    ((plan,),) = GPTQ(bits=[3], group=64, symmetric=True).plan({"a": (576, 576)}).values()
    assert plan.cost / 576**2 == pytest.approx(3 + 16 / 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": []}, r"bits"),
        ({"bits": [4, 3]}, "rising"),
        ({"bits": [3, 3]}, "rising"),
        ({"bits": [1]}, "from 2 to 8"),
        ({"bits": ["3"]}, "from 2 to 8"),
        ({"group": 0}, r"group"),
        ({"damping": 0}, r"damping"),
        ({"symmetric": "yes"}, "true or false"),
        ({"column_block": 0}, "column_block"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GPTQ(**settings)


def test_a_group_that_does_not_divide_is_told_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"group must be null or a divisor .* 1 layers \(a .* 100"):
        GPTQ(group=64).plan({"a": (10, 100)})


@pytest.mark.parametrize(
    "compressor", [GPTQ(bits=[2, 4], group=8, grid="mse", order="activation"), SparseGPTQ(group=8)]
)
def test_layers_too_large_for_one_sweep_are_made_in_parts(compressor, monkeypatch) -> None:
    draws = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(rows, 32, generator=draws) for name, rows in (("a", 24), ("b", 8), ("c", 16))}
    at_once = made_by(compressor, weights, gram_of(32))
    monkeypatch.setattr(compensate, "ENTRIES_AT_ONCE", 2 * 24 * 32)
    assert len(compensate.parts_of([*weights.values()], copies=2)) == 2
    in_parts = made_by(compressor, weights, gram_of(32))
    for name, levels in at_once.items():
        for level, payload in levels.items():
            assert torch.equal(payload.weight, in_parts[name][level].weight)
