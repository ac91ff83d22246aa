"""Units inside a unit that may be dropped: what they cost, and moves that open and shut it."""

import numpy as np
import pytest

from evosweep.allocators.base import allocate
from evosweep.allocators.uniform import Uniform
from evosweep.core.errors import BudgetError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.search import moves
from evosweep.search.mutation import Flips

WIDTHS = tuple(Level(name=f"{bits}bit", cost=100 * bits) for bits in (2, 3, 4))
DROP = (Level(name="dropped", cost=0), Level(name="kept", cost=10))


def problem(budget: int = 1820, sublayers: int = 3) -> Problem:
    """Sub-blocks of two layers each."""
    units: list[Unit] = []
    for block in range(sublayers):
        inside = [Unit(name=f"b.{block}.{name}", numel=100, block=block, levels=WIDTHS) for name in "xy"]
        units += [
            Unit(name=f"b.{block}", numel=10, block=block, levels=DROP, gates=tuple(u.name for u in inside)),
            *inside,
        ]
    return Problem(units=tuple(units), budget=budget)


def test_what_is_dropped_costs_nothing() -> None:
    genome = np.array([1, 1, 1, 0, 2, 2, 1, 0, 0])
    assert problem().cost(genome) == (10 + 600) + 0 + (10 + 400)
    assert problem().least == 0 and problem().most == 3 * 810


def test_steps_carry_what_is_behind_the_gate() -> None:
    genome = np.array([1, 1, 1, 0, 2, 2, 1, 0, 0])
    assert moves.steps_up(problem(), genome).tolist() == [-1, 100, 100, 810, -1, -1, -1, 100, 100]
    assert moves.steps_down(problem(), genome).tolist() == [610, 100, 100, -1, -1, -1, 410, -1, -1]


def test_moves_keep_the_budget_and_reach_both_kinds() -> None:
    bound = problem(budget=1300)
    seen, genome = set(), bound.uniform()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        genome = Flips()(bound, genome, rng)
        assert bound.feasible(genome) and (genome < bound.sizes).all() and (genome >= 0).all()
        seen.add(tuple(genome[::3]))
    assert len(seen) > 3  # gates opened and shut
    for seed in range(20):
        assert bound.feasible(moves.random_feasible(bound, np.random.default_rng(seed)))


def test_uniform_drops_nothing_unless_it_must() -> None:
    assert problem(budget=1830).uniform().tolist() == [1, 1, 1] * 3
    assert problem(budget=1829).uniform().tolist() == [1, 0, 0] * 3
    assert not problem(budget=1000).uniform().any()


def test_allocators_that_know_no_gates_leave_them_open() -> None:
    assert allocate(Uniform(), problem(budget=1830)).tolist() == [1, 1, 1] * 3
    with pytest.raises(BudgetError, match="below the least"):
        allocate(Uniform(), problem(budget=1000))


def test_uniform_does_not_drop_everything() -> None:
    units = tuple(Unit(name=f"b.{n}", numel=10, block=n, levels=DROP) for n in range(4))
    with pytest.raises(SettingError, match=r"block_influence.*'uniform'"):
        Uniform().check(Problem(units=units, budget=30))
