import numpy as np
import pytest
import torch

from evosweep.compressors.base import LevelSpec, layer_error
from evosweep.compressors.error_factors import leading_directions
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.low_rank import LowRank, convex
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.several import Several
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.packed import TENSORS, PackedSafetensors
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing.compressor import CompressorContract, gram_of, made_by


class _LeavesOutDominated:
    def offers(self, unit: str, level: str, payloads) -> bool:
        return "+" not in level or level in payloads[unit]


class TestOnGPTQ(_LeavesOutDominated, CompressorContract):
    def make(self) -> LowRank:
        return LowRank(base=GPTQ(bits=[2, 3, 4], group=16), ranks=[0, 1, 2, 5], factor_bits=16, keep="undominated")


class TestLoRCInEightBits(_LeavesOutDominated, CompressorContract):
    def make(self) -> LowRank:
        return LowRank(base=RoundToNearest(bits=[2, 4], group=32), method="lorc", ranks=[0, 3, 8], keep="undominated")


class TestOnSeveral(_LeavesOutDominated, CompressorContract):
    def make(self) -> LowRank:
        parts = {"bits": GPTQ(bits=[2, 4], group=16), "sparse": SparseGPT(sparsity=0.5, window=0, mask_block=16)}
        return LowRank(base=Several(parts=parts), ranks=[0, 2])

    def offers(self, unit: str, level: str, payloads) -> bool:
        return level in payloads[unit]


def reference(error: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """EoRA as in the paper: to the eigenspace, SVD, and back; float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    project = vectors * values.clamp(min=0).sqrt()
    left, singular, right = torch.linalg.svd(error.double() @ project, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.inv(project)


@pytest.mark.parametrize("rows", [24, 80])
@pytest.mark.parametrize("method", ["eora", "lorc"])
def test_factors_are_those_of_the_papers(rows: int, method: str) -> None:
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    moment = gram_of(32)
    compressor = LowRank(
        base=RoundToNearest(bits=[2], group=32), ranks=[0, 4, 16], method=method, factor_bits=16, keep="all"
    )
    made = made_by(compressor, {"a": weight}, moment)["a"]
    error = weight - made["2bit"].weight
    for rank in (4, 16):  # with which the iteration is exact
        wanted = reference(error, moment if method == "eora" else torch.eye(32), rank)
        product = made[f"2bit+r{rank}"].weight - made["2bit"].weight
        assert torch.allclose(product.double(), wanted, atol=2e-3)
        exact = layer_error(error - wanted.float(), moment)
        assert made[f"2bit+r{rank}"].error == pytest.approx(exact, rel=2e-3)


def test_wide_errors_lose_little_to_the_iteration() -> None:
    moment = gram_of(160, tokens=2000)
    error = torch.randn(1, 200, 160, generator=torch.Generator().manual_seed(3))
    found = leading_directions(error, moment, rank=16)[0].double()
    assert torch.allclose(found.T @ found, torch.eye(16).double(), atol=1e-5)
    seen = error[0].double() @ moment.double() @ error[0].double().T
    kept = (found * (seen @ found)).sum()
    best = torch.linalg.eigvalsh(seen)[-16:].sum()
    assert best * 0.99 < kept <= best * (1 + 1e-9)


def test_eight_bits_cost_little_more_error_than_sixteen() -> None:
    weights = {"a": torch.randn(64, 48, generator=torch.Generator().manual_seed(1)) * 0.01}
    errors = {}
    for width in (16, 8):
        compressor = LowRank(base=RoundToNearest(bits=[2], group=48), ranks=[0, 12], factor_bits=width, keep="all")
        made = made_by(compressor, weights, gram_of(48))["a"]
        errors[width] = made["2bit+r12"].error
    assert errors[8] == pytest.approx(errors[16], rel=0.02)
    assert errors[8] < 0.7 * made["2bit"].error


def test_only_levels_with_factors_are_left_out() -> None:
    weights = {"a": torch.randn(24, 32, generator=torch.Generator().manual_seed(1))}
    settings = {"base": GPTQ(bits=[2, 3, 4], group=16), "ranks": [0, 2, 16], "factor_bits": 16}
    everything, worth, hull = (
        made_by(LowRank(**settings, keep=keep), weights, gram_of(32))["a"] for keep in ("all", "undominated", "convex")
    )
    assert set(everything) == {f"{bits}bit{rank}" for bits in (2, 3, 4) for rank in ("", "+r2", "+r16")}
    assert {"2bit", "3bit", "4bit"} <= set(hull) < set(worth) < set(everything)
    costs = {name: payload.bits for name, payload in everything.items()}
    for name in set(everything) - set(worth):
        assert any(costs[o] <= costs[name] and everything[o].error <= everything[name].error for o in worth)


def test_the_hull_is_below_every_mix() -> None:
    costs = {"a": 10, "b": 12, "c": 14, "d": 20, "e": 22, "f": 30}
    errors = {"a": 8.0, "b": 5.0, "c": 4.5, "d": 1.0, "e": 1.5, "f": 0.5}
    levels = [LevelSpec(name, cost, Nominal("bits", 2.0), None) for name, cost in costs.items()]
    assert [level.name for level in convex(levels, errors)] == ["a", "b", "d", "f"]


def test_a_number_means_the_level_without_factors(anatomy, splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    base = GPTQ(bits=[2, 3], group=16)
    plan = plan_store(anatomy, LowRank(base=base, ranks=[0, 1, 2], keep="all"))
    store = StoreBuilder().open(plan, splits["calibration"], model_name="tiny")
    shared = store.units[0].name
    tensors = store.payload(shared, "3bit+r2").names
    assert tensors["base/codes"] == store.payload(shared, "3bit").names["codes"]  # on disk once
    plain = StoreBuilder().open(plan_store(anatomy, base), splits["calibration"], model_name="tiny")
    problem = Budget(as_uniform=3).problem(store.units, planned=plan.units)
    assert problem.budget == sum(unit.levels[-1].cost for unit in plain.units)
    for unit, expected in zip(store.units, plain.units, strict=True):  # later blocks are calibrated through 3bit too
        by_name = {level.name: level for level in unit.levels}
        assert by_name["3bit"].error == pytest.approx(expected.levels[-1].error, rel=1e-3)
        assert torch.equal(store.weight(unit.name, "3bit"), plain.weight(unit.name, "3bit"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": 5}, "base must be a compressor"),
        ({"base": GPTQ(), "ranks": []}, "ranks must be a list"),
        ({"base": GPTQ(), "ranks": [8, 4]}, "ranks must be rising"),
        ({"base": GPTQ(), "ranks": [-1]}, "ranks must be an integer of at least 0"),
        ({"base": GPTQ(), "ranks": 8.5}, "ranks must be an integer"),
        ({"base": GPTQ(), "method": "eoar"}, "did you mean 'eora'"),
        ({"base": GPTQ(), "factor_bits": 4}, "factor_bits must be 16 or 8"),
        ({"base": GPTQ(), "keep": "some"}, "keep must be one of convex, undominated, all"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LowRank(**settings)


def test_a_rank_above_the_width_names_the_layers() -> None:
    compressor = LowRank(base=GPTQ(group=16), ranks=[0, 16, 40])
    with pytest.raises(
        SettingError, match=r"ranks must be .* 2 layers \(b \.\.\.\) are narrower, and 24 fits all, got 40"
    ):
        compressor.plan({"a": (64, 48), "b": (24, 64), "c": (64, 32)})


def test_factors_on_factors_are_refused() -> None:
    inner = LowRank(base=GPTQ(group=16), ranks=[0, 2])
    with pytest.raises(SettingError, match=r"base must be a compressor without factors"):
        LowRank(base=inner, ranks=[0, 2]).plan({"a": (24, 32)})


def test_a_model_with_factors_is_exported_as_it_was_scored(anatomy, loaded, splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "cache"))
    plan = plan_store(anatomy, LowRank(base=GPTQ(bits=[2, 3], group=16), ranks=[0, 2], keep="all"))
    store = StoreBuilder().open(plan, splits["calibration"], model_name="tiny")
    problem = Budget(as_uniform="3bit+r2").problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.array([unit.level_names.index("3bit+r2") for unit in store.units])
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    facts = PackedSafetensors().export(
        genome, problem=problem, evaluator=evaluator, folder=tmp_path / "model", loaded=loaded
    )
    assert facts["max_logit_difference"] < 1e-5
    file = tmp_path / "model" / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == pytest.approx(1e6 * problem.megabytes(problem.cost(genome)), abs=1)
