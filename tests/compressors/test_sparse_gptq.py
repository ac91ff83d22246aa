import numpy as np
import pytest
import torch

from evosweep.compressors.base import layer_error
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparse_gptq import SparseGPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by
from tests.compressors.test_integer import grid_float64, search_settings


class TestSparseGPTQ(CompressorContract):
    def make(self) -> SparseGPTQ:
        return SparseGPTQ(sparsity=[0.75, 0.5], bits=[3, 5], group=16, mask_block=16, column_block=4)

    def reference(self, weight, gram, level):
        compressor, sparse = self.make(), level.spec.sparse
        settings = {"kept": sparse.kept, "pattern": sparse.pattern, "width": level.spec.bits}
        settings |= {"block": compressor.mask_block, "group": compressor.group, "damping": compressor.damping}
        settings |= {"symmetric": compressor.symmetric}
        made = [
            torch.from_numpy(joint_float64(weight, gram, **settings, order=order, **search_settings(search)))
            for search in compressor.search.searches
            for order in {"given", compressor.order}
        ]
        return min(made, key=lambda one: layer_error(weight - one, gram))


class TestSymmetric(TestSparseGPTQ):
    def make(self) -> SparseGPTQ:
        return SparseGPTQ(sparsity=[0.25], bits=[2, 4], group=16, mask_block=32, symmetric=True)


class TestOrdered(TestSparseGPTQ):
    def make(self) -> SparseGPTQ:
        return SparseGPTQ(
            sparsity=[0.5], bits=[3, 5], group=16, mask_block=16, order="activation", grid="mse", grid_steps=6
        )


def test_patterns_need_columns_as_they_are_given() -> None:
    with pytest.raises(SettingError, match=r"order must be one of given, got .activation.*N:M"):
        SparseGPTQ(sparsity=["2:4"], order="activation")


class TestSearched(TestSparseGPTQ):
    def make(self) -> SparseGPTQ:
        return SparseGPTQ(sparsity=[0.25], bits=[2, 4], group=8, mask_block=16, grid="mse", grid_norm=2, grid_least=0.4)


class TestPatterns(TestSparseGPTQ):
    def make(self) -> SparseGPTQ:
        return SparseGPTQ(sparsity=["2:4"], bits=[3, 6], group=16, mask_block=16)


def test_every_level_is_no_worse_by_activation() -> None:
    scale = torch.logspace(0, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    weight, gram = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)), gram_of(64) * scale * scale[:, None]
    errors = []
    for order in ("given", "activation"):
        compressor = SparseGPTQ(sparsity=[0.25, 0.75], bits=[3], group=16, mask_block=16, order=order)
        made = made_by(compressor, {"a": weight}, gram)["a"].values()
        errors.append([layer_error(weight - one.weight, gram) for one in made])
    assert all(ordered <= given * 1.0001 for given, ordered in zip(*errors, strict=True))
    assert min(ordered / given for given, ordered in zip(*errors, strict=True)) < 0.95


def joint_float64(
    weight, gram, *, kept, width, group, damping, block, pattern=None, symmetric=False, order="given", **search
):
    """Masks and rounding in one loop, straight from SparseGPT's Algorithm 1 and section 3.5, in float64."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy().copy()
    columns, top, mask, grids = weight.shape[1], 2**width - 1, np.zeros(weight.shape, dtype=bool), {}
    permutation = np.arange(columns)
    if order == "activation":
        permutation = np.argsort(-np.diag(gram), kind="stable")
        for start in range(0, columns, group):
            members = weight[:, start : start + group]
            grids[start] = grid_float64(members, top=top, symmetric=symmetric, **search)
    weight, gram = weight[:, permutation], gram[permutation][:, permutation]
    gram += damping * np.diag(gram).mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    for column in range(columns):
        stop = min(column + (pattern[1] if pattern else block), columns)
        scores = (weight[:, column:stop] / np.diag(upper)[column:stop]) ** 2
        if pattern and column % pattern[1] == 0:
            ranks = np.argsort(np.argsort(-scores, axis=1), axis=1)
            mask[:, column:stop] = ranks < pattern[0]
        elif not pattern and column % block == 0:
            quota = kept * stop // columns - kept * column // columns
            mask[:, column:stop].flat[np.argsort(-scores, axis=None)[:quota]] = True
        home = permutation[column] // group * group
        if home not in grids:
            members = slice(column, column + group)
            there = weight[:, members] * (mask[:, members] | (pattern is not None))
            grids[home] = grid_float64(there, top=top, symmetric=symmetric, **search)
        scale, zero = grids[home]
        codes = np.clip(np.round(weight[:, column] / scale + zero), 0, top)
        settled = np.where(mask[:, column], (codes - zero) * scale, 0)
        error = (weight[:, column] - settled) / upper[column, column]
        weight[:, column] = settled
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return weight[:, np.argsort(permutation)]


@pytest.mark.parametrize(("sparsity", "width", "block"), [(0.5, 3, 32), (0.75, 2, 64), (0.25, 4, 16)])
def test_equals_a_float64_reference(sparsity: float, width: int, block: int) -> None:
    weight, gram = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)), gram_of(64)
    compressor = SparseGPTQ(sparsity=[sparsity], bits=[width], group=16, mask_block=block, column_block=8)
    (plan,) = compressor.plan({"a": (48, 64)})["a"]
    made = made_by(compressor, {"a": weight}, gram)["a"][plan.name].weight
    expected = torch.from_numpy(
        joint_float64(weight, gram, kept=plan.spec.sparse.kept, width=width, group=16, damping=0.01, block=block)
    )
    assert torch.isclose(made.double(), expected, atol=1e-3).double().mean() >= 0.99
    errors = [layer_error((weight - each).double(), gram.double()) for each in (made, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_one_loop_for_both_beats_rounding_what_is_left() -> None:
    weight, gram = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), gram_of(64, mixing=2.0)
    joint, pruner = SparseGPTQ(sparsity=[0.5], bits=[2], group=16), SparseGPT(sparsity=0.5, window=0)
    (level,) = made_by(joint, {"a": weight}, gram)["a"].values()
    (half,) = made_by(pruner, {"a": weight}, gram)["a"].values()
    rounded = made_by(RoundToNearest(bits=[2], group=16), {"a": half.weight}, gram)["a"]["2bit"].weight
    apart = torch.where(half.weight == 0, 0.0, rounded)
    assert layer_error(weight - level.weight, gram) < 0.95 * layer_error(weight - apart, gram)


def test_patterns_hold_in_every_group_of_a_row() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    compressor = SparseGPTQ(sparsity=["2:4"], bits=[8], group=16)
    (made,) = made_by(compressor, {"a": weight}, gram_of(32))["a"].values()
    assert ((made.weight.view(-1, 4) != 0).sum(dim=1) <= 2).all()


def test_nothing_removed_costs_a_mask_more_than_gptq() -> None:
    ((plan,),) = SparseGPTQ(sparsity=[1 / 576**2], bits=[3]).plan({"a": (576, 576)}).values()
    ((dense,),) = GPTQ(bits=[3]).plan({"a": (576, 576)}).values()
    assert plan.cost - dense.cost == pytest.approx(576**2, abs=24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": []}, r"sparsity must be a list"),
        ({"sparsity": "2:4"}, r"sparsity must be a list"),
        ({"sparsity": [0.5, 1.2]}, r"sparsity\[1\].*1\.2"),
        ({"sparsity": [1]}, r"sparsity\[0\].*below 1"),
        ({"sparsity": ["4:2"]}, r"sparsity\[0\].*N:M"),
        ({"bits": [9]}, "from 2 to 8"),
        ({"group": 48}, r"group must be a divisor of compressor\.mask_block=128"),
        ({"damping": 0}, r"damping"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SparseGPTQ(**settings)


def test_a_pattern_that_does_not_divide_is_told_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"M of sparsity must be .* 1 layers \(a .* 64, .*'2:5'"):
        SparseGPTQ(sparsity=["2:5"]).plan({"a": (10, 64)})
