import numpy as np
import pytest

from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.core.unit import Level, Unit
from evosweep.search import moves
from evosweep.search.evolution import EvoPress
from evosweep.search.mutation import Flips
from evosweep.testing.problems import ladder, make_problem


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


def random_problem(seed: int, *, gates: bool = False, tight: float | None = None) -> Problem:
    """Return units with unequal steps and levels of equal cost, some of them inside of units that can be dropped."""
    draw = rng(seed)
    units: list[Unit] = []
    for block in range(int(draw.integers(2, 6))):
        inside = []
        for name in "abc":
            steps = draw.choice([0, 0, 7, 10, 10, 31], size=int(draw.integers(0, 6)))
            costs = np.concatenate([[0], np.cumsum(steps)]) + int(draw.integers(0, 40))
            levels = tuple(Level(f"l{n}", int(cost)) for n, cost in enumerate(costs))
            inside.append(Unit(f"b.{block}.{name}", 10, block, levels))
        if gates:
            own = (Level("dropped", 0), Level("kept", int(draw.choice([0, 5]))))
            units.append(Unit(f"b.{block}", 1, block, own, gates=tuple(unit.name for unit in inside)))
        units += inside
    problem = Problem(tuple(units), budget=10**9)
    share = float(draw.uniform(0, 1)) if tight is None else tight
    return Problem(tuple(units), budget=int(problem.least + share * (problem.most - problem.least)))


def reaches_least(problem: Problem, genome: np.ndarray) -> bool:
    return not (moves.steps_down(problem, genome) > 0).any()


@pytest.mark.parametrize("gates", [False, True], ids=["layers", "layers that can be dropped"])
class TestAnyLadder:
    """Random ladders with equal costs, unequal steps and single levels; budgets from the least to the most."""

    def test_random_genomes_keep_and_spend_the_budget(self, gates: bool) -> None:
        for seed in range(150):
            problem = random_problem(seed, gates=gates)
            genome = moves.random_feasible(problem, rng(seed))
            slack = problem.budget - problem.cost(genome)
            up = moves.steps_up(problem, genome)
            assert (genome >= 0).all() and (genome < problem.sizes).all()
            assert slack >= 0 and not ((up >= 0) & (up <= slack)).any()

    def test_repair_always_succeeds_and_goes_down_to_the_least(self, gates: bool) -> None:
        for seed in range(150):
            problem = random_problem(seed, gates=gates, tight=0.0)
            genome = problem.sizes - 1
            assert moves.repair(problem, genome, rng(seed))
            assert problem.cost(genome) == problem.least == problem.budget
            assert reaches_least(problem, genome)

    def test_steps_are_the_differences_of_the_cost(self, gates: bool) -> None:
        for seed in range(100):
            problem = random_problem(seed, gates=gates)
            genome = rng(seed).integers(0, problem.sizes)
            for steps, table, sign in (
                (moves.steps_up(problem, genome), problem.next_up, 1),
                (moves.steps_down(problem, genome), problem.next_down, -1),
            ):
                for unit in np.flatnonzero(steps >= 0):
                    moved = genome.copy()
                    moved[unit] = table[unit, genome[unit]]
                    assert sign * (problem.cost(moved) - problem.cost(genome)) == steps[unit]

    def test_moves_and_mutants_keep_the_budget(self, gates: bool) -> None:
        for seed in range(100):
            problem = random_problem(seed, gates=gates)
            genome = moves.random_feasible(problem, rng(seed))
            for move in (moves.swap, moves.exchange, moves.sidestep):
                moved = genome.copy()
                changed = move(problem, moved, rng(seed))
                assert changed == (moved != genome).any()
                assert problem.feasible(moved) and (moved >= 0).all() and (moved < problem.sizes).all()
                if move is not moves.exchange:
                    assert problem.cost(moved) == problem.cost(genome) or problem.gated
            for draw in range(8):
                genome = Flips(cross=0.3)(problem, genome, rng(draw))
                assert problem.feasible(genome) and (genome >= 0).all() and (genome < problem.sizes).all()


def equal_pairs(budget_share: float) -> Problem:
    """Return the ladder of 50 % and 2:4 sparsity at 2 and 4 bits: levels 0 and 1 cost the same, 2 and 3 too."""
    units = tuple(
        Unit(f"b.{n // 2}.x{n % 2}", size, n // 2, tuple(Level(f"l{k}", size * c) for k, c in enumerate((2, 2, 3, 3))))
        for n, size in enumerate((16, 16, 32) * 5)
    )
    least = sum(unit.levels[0].cost for unit in units)
    most = sum(unit.levels[-1].cost for unit in units)
    return Problem(units, budget=int(least + budget_share * (most - least)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_search_moves_over_levels_of_equal_cost(share: float) -> None:
    problem = equal_pairs(share)
    draws = [moves.random_feasible(problem, rng(seed)) for seed in range(200)]
    assert all(problem.feasible(genome) for genome in draws)
    assert len({genome.tobytes() for genome in draws}) >= 190
    (parent, *_) = EvoPress(problem, seed=0, offspring=16).start()
    offspring = EvoPress(problem, seed=0, offspring=16).offspring(generation=1, parents=[parent])
    assert sum((child != parent).any() for child in offspring) >= 15
    assert all(problem.feasible(child) for child in offspring)


def test_all_levels_of_equal_cost_are_reached() -> None:
    problem = equal_pairs(0.5)
    genome, seen = problem.uniform(), set()
    for seed in range(400):
        genome = Flips()(problem, genome, rng(seed))
        seen |= set(enumerate(genome.tolist()))
    assert len(seen) == problem.total_levels


class OneUp:
    """A mutation of somebody else."""

    def __call__(self, problem: Problem, parent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        child = parent.copy()
        moves.exchange(problem, child, rng)
        return child


def test_the_mutation_is_a_strategy(problem: Problem) -> None:
    parent = problem.uniform()
    children = EvoPress(problem, seed=0, offspring=4, mutation=OneUp()).offspring(generation=1, parents=[parent])
    expected = [OneUp()(problem, parent, generator(0, "offspring", 1, slot)) for slot in range(4)]
    assert [child.tolist() for child in children] == [child.tolist() for child in expected]
    with pytest.raises(SettingError, match="mutation must be a mutation"):
        EvoPress(problem, seed=0, offspring=4, mutation="swap")  # type: ignore[arg-type]
