"""Allocators of the additive model against trying every genome."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evosweep.allocators.base import allocate
from evosweep.allocators.dp import DP
from evosweep.allocators.greedy import Greedy
from evosweep.allocators.harm import LEAST_RISE
from evosweep.allocators.ilp import ILP
from evosweep.core.errors import BudgetError, SettingError
from evosweep.core.problem import Genome, Problem
from tests.strategies import CHECKED, cost_by_hand, costs_of_all, every_genome, problems

EXACT = 1e-11  # relative error of a sum of floating-point numbers, with room


def harm_of(problem: Problem, genome: Genome) -> float:
    """Return the sum of what the levels of a genome do, gates aside."""
    pairs = [(unit, unit.levels[level].name) for unit, level in zip(problem.units, genome, strict=True)]
    return sum(max(unit.columns[f"kl_around_top/{name}"], LEAST_RISE) for unit, name in pairs if not unit.gates)


def least_harm(problem: Problem) -> float | None:
    """Return the least harm within the budget of all genomes that drop nothing; None if there is none."""
    found = every_genome(problem)
    fits = costs_of_all(problem) <= problem.budget
    kept = (found > 0)[:, problem.gating].all(axis=1)
    return min((harm_of(problem, genome) for genome in found[fits & kept]), default=None)


@pytest.mark.parametrize("kind", [ILP, DP])
class TestOptimum:
    @CHECKED
    @given(problem=problems(gates=False, columns=True))
    def test_it_is_what_trying_everything_finds(self, kind, problem: Problem) -> None:
        genome = kind().allocate(problem)
        assert cost_by_hand(problem, genome) <= problem.budget
        best = least_harm(problem)
        assert best is not None and best <= harm_of(problem, genome) * (1 + EXACT)
        assert harm_of(problem, genome) <= best * (1 + EXACT)

    @CHECKED
    @given(problem=problems(gates=True, columns=True))
    def test_nothing_is_dropped_and_that_is_refused_only_where_it_must_be(self, kind, problem: Problem) -> None:
        best = least_harm(problem)
        if best is None:
            with pytest.raises(BudgetError):
                allocate(kind(), problem)
            return
        genome = allocate(kind(), problem)
        assert problem.alive(genome).all() and cost_by_hand(problem, genome) <= problem.budget
        assert harm_of(problem, genome) == pytest.approx(best, rel=EXACT)


@CHECKED
@given(problems(gates=False, columns=True))
def test_greedy_fits_and_leaves_no_step_that_helps(problem: Problem) -> None:
    genome = Greedy().allocate(problem)
    assert cost_by_hand(problem, genome) <= problem.budget
    best = least_harm(problem)
    assert best is not None and harm_of(problem, genome) >= best * (1 - EXACT)
    for unit, size in enumerate(problem.sizes):
        for level in range(size):
            moved = genome.copy()
            moved[unit] = level
            dearer = problem.cost(moved) > problem.cost(genome)
            assert not (dearer and problem.feasible(moved)) or harm_of(problem, moved) >= harm_of(problem, genome)


@CHECKED
@given(problems(gates=False, columns=True), st.integers(1, 40))
def test_too_many_states_are_refused_with_a_number_that_is_enough(problem: Problem, states: int) -> None:
    try:
        DP(states=states).check(problem)
    except SettingError as error:
        enough = int(str(error).split("at least ")[1].split()[0])
        assert enough > states
        DP(states=enough).check(problem)
    else:
        assert np.isfinite(harm_of(problem, DP(states=states).allocate(problem)))
