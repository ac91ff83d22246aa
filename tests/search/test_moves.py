import numpy as np
import pytest

from evosweep.core.problem import Problem
from evosweep.core.unit import Unit
from evosweep.search import moves
from evosweep.search.evopress import EvoPress
from evosweep.search.mutation import Flips
from tests.conftest import ladder, make_problem


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_swap_keeps_the_exact_cost(problem: Problem) -> None:
    for seed in range(50):
        genome = problem.uniform()
        assert moves.swap(problem, genome, rng(seed))
        assert problem.cost(genome) == problem.budget
        assert np.abs(genome - problem.uniform()).sum() == 2


def test_exchange_moves_budget_between_sizes(problem: Problem) -> None:
    moved = set()
    for seed in range(60):
        genome = problem.uniform()
        assert moves.exchange(problem, genome, rng(seed))
        assert problem.feasible(genome)
        moved.add(int((genome - 1) @ problem.numels))
    assert len(moved) > 1 or problem.cost(genome) <= problem.budget
    sizes_raised = {tuple(sorted(problem.numels[genome > 1])) for genome in [_exchanged(problem, s) for s in range(60)]}
    assert any(300 in sizes for sizes in sizes_raised) and any(100 in sizes for sizes in sizes_raised)


def _exchanged(problem: Problem, seed: int) -> np.ndarray:
    genome = problem.uniform()
    moves.exchange(problem, genome, rng(seed))
    return genome


@pytest.mark.parametrize("cross", [0.0, 0.5, 1.0])
def test_mutants_fit_the_budget_and_differ(problem: Problem, cross: float) -> None:
    parent = problem.uniform()
    for seed in range(100):
        child = Flips(cross=cross)(problem, parent, rng(seed))
        assert problem.feasible(child) and (child != parent).any()
        assert (child >= 0).all() and (child < problem.sizes).all()


def test_mutation_without_any_legal_move_ends_and_returns_the_parent() -> None:
    single = Problem(units=(Unit("a", 10, 0, ladder(10, (3,))),), budget=10**6)
    assert (Flips()(single, single.uniform(), rng()) == 0).all()


def test_unequal_ladders_still_move() -> None:
    units = tuple(Unit(f"u{n}", 100 + 7 * n, n, ladder(100 + 7 * n, (2, 3, 4, 8))) for n in range(6))
    problem = Problem(units=units, budget=sum(unit.levels[1].cost for unit in units))
    seen = {tuple(Flips(cross=0.0)(problem, problem.uniform(), rng(seed))) for seed in range(40)}
    assert len(seen) > 5


def test_random_genomes_spend_the_budget(problem: Problem) -> None:
    for seed in range(50):
        genome = moves.random_feasible(problem, rng(seed))
        slack = problem.budget - problem.cost(genome)
        up = moves.steps_up(problem, genome)
        assert slack >= 0 and not ((up >= 0) & (up <= slack)).any()


def test_fewer_flips_are_likelier(problem: Problem) -> None:
    distances = [int(np.abs(Flips(cross=0.0)(problem, problem.uniform(), rng(seed)) - 1).sum()) for seed in range(400)]
    # P(min(U{1..3}, U{1..3}) = 1) = 5/9; a later flip rarely undoes an earlier one.
    assert 0.48 < np.mean([distance == 2 for distance in distances]) < 0.66


class TestEvoPress:
    def test_starts_from_uniform_where_that_is_the_budget(self, problem: Problem) -> None:
        (start,) = EvoPress(problem, seed=0, offspring=4).start()
        assert (start == 1).all()

    def test_starts_from_several_fillings_where_it_is_not(self) -> None:
        problem = make_problem(make_problem().budget + 350)
        starts = EvoPress(problem, seed=0, offspring=4, start_candidates=5).start()
        assert len(starts) == 5 and all(problem.feasible(start) for start in starts)
        assert len({tuple(start) for start in starts}) > 1

    def test_an_offspring_depends_on_its_place_alone(self, problem: Problem) -> None:
        few, many = (EvoPress(problem, seed=3, offspring=n) for n in (4, 9))
        parent = problem.uniform()
        for first, second in zip(
            few.offspring(generation=2, parents=[parent]), many.offspring(generation=2, parents=[parent]), strict=False
        ):
            assert (first == second).all()
        other = EvoPress(problem, seed=4, offspring=4).offspring(generation=2, parents=[parent])
        assert any((a != b).any() for a, b in zip(few.offspring(generation=2, parents=[parent]), other, strict=True))
