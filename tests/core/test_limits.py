"""Bounds beside a problem's size: memory of a device, milliseconds of kernels."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evosweep.allocators.greedy import Greedy
from evosweep.allocators.ilp import ILP
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError, SettingError
from evosweep.core.latency import Objective
from evosweep.core.problem import Problem
from evosweep.core.unit import Unit, with_columns
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.random import RandomFeasibleSampler
from evosweep.samplers.static import AllocatorSampler
from evosweep.samplers.two_objectives import TwoObjectivesSampler
from evosweep.testing.problems import make_problem

UNITS = make_problem().units
SPEEDS = {"2bit": 0.004, "3bit": 0.009, "4bit": 0.005}  # three bits are slowest: no order of size


@pytest.fixture
def objective(tmp_path: Path) -> Objective:
    path = tmp_path / "latency.json"
    path.write_text(
        json.dumps({"milliseconds": {"linear_[01]": SPEEDS, "linear_2": {k: 3 * v for k, v in SPEEDS.items()}}})
    )
    return Objective(latency=str(path))


def timed(objective: Objective) -> tuple[Unit, ...]:
    return with_columns(UNITS, objective.columns(UNITS))


def on_device(problem: Problem, genome: np.ndarray) -> float:
    """Return the megabytes of the third unit of every block, and of what is no unit, worked out by hand."""
    bits = sum(u.levels[g].cost for u, g in zip(problem.units, genome, strict=True) if u.name.endswith("linear_2"))
    return (bits + problem.fixed_bits) / 8e6


def milliseconds(genome: np.ndarray) -> float:
    speeds = np.array(list(SPEEDS.values()))[genome]
    return float((speeds * np.array([1, 1, 3] * 4)).sum())


def device_problem(share: float = 0.3, **budget: float) -> Problem:
    free = Budget(bits_per_weight=9.0).problem(UNITS, fixed_bits=800)
    low = on_device(free, np.zeros(12, dtype=int))
    high = on_device(free, free.sizes - 1)
    second = {"device_megabytes": low + share * (high - low), "on_device": ["linear_2"]}
    return Budget(**{"bits_per_weight": 3.2, **budget}, **second).problem(UNITS, fixed_bits=800)


def best(problem: Problem) -> float:
    """Return the least harm within all bounds, by trying every genome of a smaller problem."""
    table = np.array([[level.error for level in unit.levels] for unit in problem.units])
    rows = range(len(problem.units))
    return min(
        table[rows, genome].sum()
        for genome in map(list, itertools.product(range(3), repeat=len(problem.units)))
        if problem.feasible(np.array(genome))
    )


def test_both_budgets_hold_and_the_ilp_is_the_optimum_within_them() -> None:
    problem = device_problem(0.25)
    limit = problem.limits[0]
    genome = ILP(harm="bare").allocate(problem)
    assert problem.feasible(genome) and on_device(problem, genome) <= limit.shown(limit.most)
    free = ILP(harm="bare").allocate(replace(problem, limits=()))
    assert on_device(problem, free) > limit.shown(limit.most)  # the second bound binds
    units = problem.units[:6]
    small = replace(
        problem,
        units=units,
        budget=int(0.55 * problem.budget),
        limits=(replace(limit, amounts=limit.amounts[:6], most=limit.most // 2),),
    )
    table = np.array([[level.error for level in unit.levels] for unit in units])
    assert table[range(6), ILP(harm="bare").allocate(small)].sum() == pytest.approx(best(small))


def test_figures_are_those_worked_out_by_hand(objective: Objective) -> None:
    problem = device_problem()
    genome = np.array([0, 1, 2] * 4)
    assert problem.limit_figures(genome) == {"device_megabytes": pytest.approx(on_device(problem, genome))}
    both = Budget(bits_per_weight=3.2, milliseconds=0.2).problem(timed(objective), fixed_bits=800)
    assert both.limit_figures(genome) == {"milliseconds": pytest.approx(milliseconds(genome))}


def searched(sampler) -> list[np.ndarray]:
    weights = 1.0 + np.arange(12) % 5
    parents: list[np.ndarray] = []
    seen = []
    for generation in range(4):
        genomes = sampler.genomes(generation=generation, parents=parents)
        seen += genomes
        losses = np.array([float(weights @ 4.0 ** -(2 + genome)) for genome in genomes])
        parents = [genomes[index] for index in list(sampler.order(genomes, losses))[: sampler.population_size]]
    return seen


@pytest.mark.parametrize(
    "make",
    [
        lambda p: EvoPressSampler(p, seed=0, offspring=32),
        lambda p: EvoPressSampler(p, seed=0, offspring=16, start=ILP(harm="bare")),
        lambda p: TwoObjectivesSampler(p, seed=0, offspring=32, population_size=6),
        lambda p: TwoObjectivesSampler(p, seed=0, offspring=16, population_size=6, start=ILP(harm="bare")),
        lambda p: RandomFeasibleSampler(p, seed=0),
    ],
)
@pytest.mark.parametrize("kind", ["device", "time", "both"])
def test_every_proposal_of_a_search_holds_all_bounds(make, kind: str, objective: Objective) -> None:
    problem = device_problem(0.3)
    if kind != "device":
        budget = Budget(bits_per_weight=3.2, milliseconds=0.13)
        time = budget.problem(timed(objective), fixed_bits=800).limits
        problem = replace(problem, limits=time if kind == "time" else (*problem.limits, *time))
    seen = searched(make(problem))
    assert all(problem.feasible(genome) for genome in seen)
    assert len({genome.tobytes() for genome in seen}) > 8


def test_a_time_alone_is_a_budget(objective: Objective) -> None:
    problem = Budget(milliseconds=0.1).problem(timed(objective), fixed_bits=800)
    assert problem.budget == problem.most
    genome = ILP(harm="bare").allocate(problem)
    assert milliseconds(genome) <= 0.1 + 1e-9 and problem.feasible(problem.uniform())


def test_what_is_reachable_is_said(objective: Objective) -> None:
    with pytest.raises(BudgetError, match=r"budget.device_megabytes must be at least 0.001 MB here .* got 1e-05"):
        Budget(bits_per_weight=3.2, device_megabytes=0.00001, on_device=["linear_2"]).problem(UNITS, fixed_bits=800)
    fastest = 0.004 * 20
    with pytest.raises(BudgetError, match=r"budget.milliseconds must be at least 0.08 ms here"):
        Budget(bits_per_weight=3.2, milliseconds=0.9 * fastest).problem(timed(objective), fixed_bits=800)
    assert Budget(bits_per_weight=3.2, milliseconds=fastest).problem(timed(objective), fixed_bits=800).limits


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device_megabytes": 1}, "no experts to leave in host memory"),
        ({"device_megabytes": 1, "on_device": ["linear_9"]}, "did you mean"),
        ({"on_device": ["linear_2"]}, "null without budget.device_megabytes"),
        ({"device_megabytes": 1, "on_device": "linear_2"}, "a list of patterns"),
        ({"device_megabytes": -1, "on_device": ["linear_2"]}, "device_megabytes"),
        ({"milliseconds": 1}, "objective.latency"),
        ({"device_megabytes": 1, "count": "active"}, "count=active"),
    ],
)
def test_bad_second_budgets_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        Budget(bits_per_weight=3.2, **settings).problem(UNITS, fixed_bits=800)


def test_an_allocator_without_limits_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"budget.device_megabytes.*greedy"):
        AllocatorSampler(device_problem(), allocator=Greedy(harm="bare"))


def test_a_level_that_the_table_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"milliseconds": {"linear_*": {"2bit": 0.1, "4bit": 0.2}}}))
    with pytest.raises(SettingError, match=r"every level of blocks.0.linear_0.*lacks 3bit"):
        Objective(latency=str(path)).columns(UNITS)
    path.write_text(json.dumps({"milliseconds": {"linear_[0-1]": SPEEDS}}))
    with pytest.raises(SettingError, match=r"no pattern matches blocks.0.linear_2"):
        Objective(latency=str(path)).columns(UNITS)
    for text in ("{}", "[1]", "not json", '{"milliseconds": {"a": {"2bit": -1}}}'):
        path.write_text(text)
        with pytest.raises(SettingError, match="latency"):
            Objective(latency=str(path))
    with pytest.raises(SettingError, match="readable JSON"):
        Objective(latency=str(tmp_path / "none.json"))
