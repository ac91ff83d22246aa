import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.several import Several
from evosweep.compressors.sparse_gptq import SparseGPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.compressors.wanda import Wanda
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.patch import replaced_weights
from evosweep.search.evolution import RandomSearch
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing.compressor import CompressorContract, gram_of, statistics_of


def both(**settings: bool) -> Several:
    joint = SparseGPTQ(sparsity=[0.75, 0.4], bits=[2, 4], group=16, mask_block=16)
    return Several(parts={"quantized": GPTQ(bits=[2, 3, 4], group=16), "joint": joint}, **settings)


class TestSeveral(CompressorContract):
    def make(self) -> Several:
        return both()

    def offers(self, unit: str, level: str, payloads) -> bool:
        return level in payloads[unit]

    def test_only_what_another_part_beats_is_left_out(self, weights, plans, payloads) -> None:
        everything = both(dominated=True).compress(weights, statistics_of(gram_of(32)), plans)
        left_out = 0
        for unit, ladder in plans.items():
            errors = {
                name: payload.output_error(weights[unit], gram_of(32)) for name, payload in everything[unit].items()
            }
            assert list(everything[unit]) == [level.name for level in ladder]
            for level in ladder:
                beaten = any(
                    other.spec.part != level.spec.part
                    and other.cost <= level.cost
                    and errors[other.name] <= errors[level.name]
                    for other in ladder
                )
                assert (level.name in payloads[unit]) == (not beaten)
                left_out += beaten
        assert left_out


def test_dominated_levels_of_one_part_are_left_out_on_request() -> None:
    weights = {"a": torch.randn(24, 32, generator=torch.Generator().manual_seed(1))}
    statistics = statistics_of(gram_of(32))
    joint = SparseGPTQ(sparsity=[0.75, 0.1], bits=[2, 8], group=16, mask_block=16)
    everything = Several(parts={"joint": joint}, dominated=True)
    plans = everything.plan({"a": (24, 32)})
    payloads = everything.compress(weights, statistics, plans)["a"]
    errors = {name: payload.output_error(weights["a"], gram_of(32)) for name, payload in payloads.items()}
    assert list(payloads) == ["75%@2bit", "10%@2bit", "75%@8bit", "10%@8bit"]
    assert errors["10%@2bit"] < errors["75%@8bit"]
    lean = Several(parts={"joint": joint}, dominated_within=False)
    assert list(lean.compress(weights, statistics, plans)["a"]) == ["75%@2bit", "10%@2bit", "10%@8bit"]
    assert list(Several(parts={"joint": joint}).compress(weights, statistics, plans)["a"]) == list(payloads)


def test_what_several_compressors_need_is_measured_once() -> None:
    free = {"a": RoundToNearest(bits=[2], group=16), "b": RoundToNearest(bits=[3], group=16)}
    assert Several(parts=free, dominated=True).needs == frozenset()
    assert Several(parts=free).needs == {"second_moment"}
    assert Several(parts={"c": Wanda(), **free}, dominated=True).needs == {"second_moment_diagonal"}


def test_parts_with_levels_of_one_name_are_an_error() -> None:
    compressor = Several(parts={"a": GPTQ(group=16), "b": RoundToNearest(group=16)})
    with pytest.raises(SettingError, match=r"parts .*different names.*2bit"):
        compressor.plan({"layer": (8, 32)})


@pytest.mark.parametrize("parts", [None, {}, [1]])
def test_no_parts_are_an_error(parts: object) -> None:
    with pytest.raises(SettingError, match=r"parts"):
        Several(parts=parts)  # type: ignore[arg-type]


def test_one_search_over_two_kinds_of_levels(anatomy, splits) -> None:
    compressor = Several(
        parts={"quantized": GPTQ(bits=[2, 4], group=16), "sparse": SparseGPT(sparsity=0.75, window=0)}, dominated=True
    )
    store = StoreBuilder(propagate=4).open(plan_store(anatomy, compressor), splits["calibration"], model_name="tiny")
    problem = Budget(bits_per_weight=4.6).problem(store.units)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    children = RandomSearch(problem, seed=0, offspring=6).draw(generation=0)
    kinds = {unit.levels[level].name[-1] for child in children for unit, level in zip(store.units, child, strict=True)}
    assert kinds == {"t", "%"}  # bits and shares
    scores = evaluator.score(np.stack(children), split="search", windows=[0], fitness=[KL()])["kl"]
    slots = [slot for slot in anatomy.slots if slot.name in {unit.name for unit in store.units}]
    for child, score in zip(children, scores, strict=True):
        weights = {
            unit.name: store.weight(unit.name, unit.levels[level].name)
            for unit, level in zip(store.units, child, strict=True)
        }
        with replaced_weights(slots, weights):
            alone = evaluator.score(None, split="search", windows=[0], fitness=[KL()])["kl"]
        assert score == pytest.approx(float(alone[0]), rel=1e-4, abs=1e-6)


def test_a_budget_may_name_a_level_that_was_not_worth_making(anatomy, splits) -> None:
    compressor = both()
    store = StoreBuilder().open(plan_store(anatomy, compressor), splits["calibration"], model_name="tiny")
    planned = plan_store(anatomy, compressor).units
    name = next(
        level.name
        for unit, plan in zip(store.units, planned, strict=True)
        for level in plan.levels
        if level.name not in unit.level_names
    )
    with pytest.raises(SettingError, match=r"as_uniform"):
        Budget(as_uniform=name).problem(store.units)
    problem = Budget(as_uniform=name).problem(store.units, planned=planned)
    assert problem.budget == sum(level.cost for unit in planned for level in unit.levels if level.name == name)
