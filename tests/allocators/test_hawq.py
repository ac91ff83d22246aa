"""HAWQ's selection against every allocation there is."""

import dataclasses
import itertools

import numpy as np
import pytest

from evosweep.allocators.hawq import HAWQ
from evosweep.allocators.ilp import ILP
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit


def measured(seed: int, units: int = 6, levels: int = 3) -> Problem:
    rng = np.random.default_rng(seed)
    made = []
    for n in range(units):
        size = int(rng.integers(50, 200))
        count = levels if n else levels - 1
        curvature = float(rng.lognormal())
        changes = [float(rng.uniform(0.5, 2)) * size * 4.0 ** -(2 + k) for k in range(count)]
        columns = {f"hawq_v2_hutchinson/{2 + k}bit": 0.5 * curvature * change for k, change in enumerate(changes)}
        ladder = tuple(Level(f"{2 + k}bit", size * (2 + k)) for k in range(count))
        made.append(Unit(f"u{n}", size, n, ladder, {**columns, "hawq_v2_hutchinson_order": curvature}))
    widest = Problem(tuple(made), budget=10**9)
    return dataclasses.replace(widest, budget=int(widest.least + rng.uniform(0.2, 0.9) * (widest.most - widest.least)))


def in_order(problem: Problem, genome: tuple[int, ...]) -> bool:
    """Whether some falling sequence of levels, cut to each ladder, gives the genome, the most sensitive unit first."""
    order = np.argsort([-unit.columns["hawq_v2_hutchinson_order"] for unit in problem.units])
    most = problem.costs.shape[1] - 1
    for unit in order:
        if genome[unit] > most:
            return False
        if genome[unit] < problem.sizes[unit] - 1:
            most = genome[unit]
    return True


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ordered", [True, False])
def test_it_is_the_best_of_all_allocations_in_order(seed: int, ordered: bool) -> None:
    problem = measured(seed)
    allocator = HAWQ(curvature="hutchinson", ordered=ordered)
    table = allocator.harm.table(problem)
    every = itertools.product(*(range(size) for size in problem.sizes))
    possible = [
        genome for genome in every if problem.feasible(np.array(genome)) and (not ordered or in_order(problem, genome))
    ]
    best = min(float(table[problem.indices, list(genome)].sum()) for genome in possible)
    found = allocator.allocate(problem)
    assert problem.feasible(found) and (not ordered or in_order(problem, tuple(found)))
    assert float(table[problem.indices, found].sum()) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_what_no_allocation_beats(seed: int) -> None:
    problem = measured(seed)
    allocator = HAWQ(ordered=False)
    frontier = allocator.frontier(problem)
    table = allocator.harm.table(problem)
    assert (np.diff(frontier.costs) > 0).all() and (np.diff(frontier.harms) < 0).all()
    for cost, harm, genome in zip(frontier.costs, frontier.harms, frontier.genomes, strict=True):
        assert problem.cost(genome) == cost <= problem.budget
        assert table[problem.indices, genome].sum() == pytest.approx(harm)
    for genome in itertools.product(*(range(size) for size in problem.sizes)):
        if problem.feasible(np.array(genome)):
            harm = table[problem.indices, list(genome)].sum()
            point = np.searchsorted(frontier.costs, problem.cost(np.array(genome)), side="right") - 1
            assert frontier.harms[point] <= harm * (1 + 1e-12)


def test_without_the_order_it_is_the_ilp_on_210_units() -> None:
    problem = measured(3, units=210, levels=5)
    table = HAWQ().harm.table(problem)
    free, ilp, ordered = (
        float(table[problem.indices, each.allocate(problem)].sum())
        for each in (HAWQ(ordered=False, points=5000), ILP(harm="hawq_v2_hutchinson"), HAWQ())
    )
    assert free == pytest.approx(ilp, rel=3e-3) and ilp <= free * (1 + 1e-9) and ilp <= ordered


def test_a_curvature_that_is_none() -> None:
    with pytest.raises(SettingError, match=r"curvature must be one of .*did you mean 'trace'"):
        HAWQ(curvature="traces")


def with_columns(problem: Problem, change) -> Problem:
    units = [
        dataclasses.replace(unit, columns={name: change(name, value) for name, value in unit.columns.items()})
        for unit in problem.units
    ]
    return dataclasses.replace(problem, units=tuple(units))


def test_curvatures_that_are_all_the_same_order_nothing() -> None:
    problem = with_columns(measured(0), lambda name, value: 2.0 if name.endswith("_order") else value)
    with pytest.raises(EvosweepError, match="curvature hawq_v2_hutchinson is the same for all 6 units: it orders"):
        HAWQ().allocate(problem)
    assert problem.feasible(HAWQ(ordered=False).allocate(problem))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "harm hawq_v2_hutchinson is the same at all levels of every unit: it prefers none"),
        (np.nan, r"harm hawq_v2_hutchinson of u0 is not a finite number \(6 of 6 units\): .*model.dtype=float32"),
        (np.inf, "not a finite number"),
    ],
)
def test_a_harm_that_prefers_no_level(value: float, message: str) -> None:
    with pytest.raises(EvosweepError, match=message):
        ILP(harm="hawq_v2_hutchinson").allocate(with_columns(measured(0), lambda *_: value))
