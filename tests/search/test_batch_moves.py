import numpy as np
import optuna
import pytest
from optuna.samplers.nsgaii._elite_population_selection_strategy import _crowding_distance_sort, _rank_population
from optuna.study import StudyDirection

from evosweep.allocators.ilp import least_harm
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.samplers.two_objectives import nsga2_order
from evosweep.search.batch_moves import BatchMoves
from evosweep.search.size_bases import STEPS, SizeBases
from evosweep.search.size_model import SizeModel
from evosweep.testing.problems import make_problem


def with_equal_costs() -> Problem:
    units = [
        Unit(f"blocks.{n}.up", 64, n, tuple(Level(f"v{k}", cost) for k, cost in enumerate((64, 128, 128, 192, 256))))
        for n in range(12)
    ]
    return Problem(tuple(units), budget=sum(unit.levels[3].cost for unit in units))


PROBLEMS = [make_problem(), with_equal_costs()]


def costs(problem: Problem, genomes: np.ndarray) -> np.ndarray:
    return np.array([problem.cost(genome) for genome in genomes])


def random_genomes(problem: Problem, rows: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.integers(0, problem.sizes) for _ in range(rows)])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_fitted_row_is_within_its_budget_and_leaves_no_room_for_a_step(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    genomes = random_genomes(problem, 200, rng)
    budgets = rng.integers(problem.least, problem.most + 1, size=200)
    batch = BatchMoves(problem)
    assert (batch.costs(genomes) == costs(problem, genomes)).all()
    batch.fit(genomes, budgets, rng)
    assert ((genomes >= 0) & (genomes < problem.sizes)).all()
    slack = budgets - costs(problem, genomes)
    rises = problem.rises[problem.indices, genomes]
    assert (slack >= 0).all() and not ((rises > 0) & (rises <= slack[:, None])).any()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("cross", [0.0, 1.0])
def test_flips_keep_every_row_at_its_cost_or_below(problem: Problem, cross: float) -> None:
    rng = np.random.default_rng(1)
    batch = BatchMoves(problem)
    genomes = random_genomes(problem, 200, rng)
    before = genomes.copy()
    counts = rng.integers(0, 4, size=200)
    batch.flip(genomes, counts, cross=cross, rng=rng)
    assert ((genomes >= 0) & (genomes < problem.sizes)).all()
    assert (costs(problem, genomes) <= costs(problem, before)).all()
    assert (genomes[counts == 0] == before[counts == 0]).all()
    changed = (genomes != before).any(axis=1)
    assert changed[counts > 0].mean() > 0.9
    single = changed & (counts == 1)
    if cross == 0.0:  # most rows allow a swap, which keeps the cost
        assert (costs(problem, genomes) == costs(problem, before))[single].mean() > 0.9


def test_a_sidestep_changes_one_unit_to_another_level_of_its_cost() -> None:
    problem = with_equal_costs()
    rng = np.random.default_rng(2)
    genomes = random_genomes(problem, 50, rng)
    genomes[0] = 0  # which has no such level
    before = genomes.copy()
    BatchMoves(problem).sidestep(genomes, np.arange(50), rng)
    assert (genomes[0] == 0).all()
    movable = ((before == 1) | (before == 2)).any(axis=1)
    assert ((genomes != before).sum(axis=1) == movable).all()
    assert (costs(problem, genomes) == costs(problem, before)).all()


def test_same_generator_same_rows() -> None:
    problem = make_problem()
    found = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        genomes = random_genomes(problem, 30, rng)
        BatchMoves(problem).flip(genomes, np.full(30, 3), cross=0.5, rng=rng)
        found.append(genomes)
    assert (found[0] == found[1]).all()


def test_the_order_is_that_of_optuna() -> None:
    rng = np.random.default_rng(4)
    sizes = rng.normal(size=60)
    losses = rng.normal(size=60)
    trials = []
    for number, values in enumerate(zip(sizes.tolist(), losses.tolist(), strict=True)):
        trial = optuna.trial.create_trial(values=list(values))
        trial.number = number
        trials.append(trial)
    expected: list[set[int]] = []
    inner: list[list[int]] = []
    for front in _rank_population(trials, [StudyDirection.MINIMIZE] * 2):
        _crowding_distance_sort(front)
        numbers = [trial.number for trial in front]
        expected.append(set(numbers[:2]))  # both ends are infinitely far from others
        inner.append(numbers[2:])
    found = nsga2_order(sizes, losses)
    for ends, rest in zip(expected, inner, strict=True):
        assert set(found[: len(ends)]) == ends and found[len(ends) : len(ends) + len(rest)] == rest
        found = found[len(ends) + len(rest) :]
    assert found == []
    assert nsga2_order(sizes, losses, count=7) == nsga2_order(sizes, losses)[:7]


def test_bases_between_knots_lie_between_what_is_chosen_there() -> None:
    problem = make_problem(make_problem().most)
    harm = np.where(problem.costs >= 0, np.exp2(-problem.costs / problem.numels[:, None]), np.inf)
    asked = []

    def base(here: Problem) -> np.ndarray:
        asked.append(here.budget)
        return least_harm(here, harm, node_limit=1000)

    bases = SizeBases(problem, base=base, least=problem.least, knots=4, seed=0)
    sizes = np.linspace(problem.least, problem.budget, 100).astype(np.int64)
    genomes = bases.at(sizes)
    assert len(asked) == 4
    found = costs(problem, genomes)
    step = (problem.budget - problem.least) / 3
    assert (np.abs(found - sizes) <= step).all() and found[-1] == problem.cost(bases.knot(problem.budget))
    assert (bases.at(bases.knots[1:2])[0] == bases.knot(int(bases.knots[1]))).all()
    assert len({genome.tobytes() for genome in genomes}) > 4 and STEPS > 1


def test_the_model_of_losses_ranks_genomes_of_other_sizes() -> None:
    problem = make_problem(make_problem().most)
    rng = np.random.default_rng(5)
    weights = rng.gamma(1.0, size=len(problem.units))

    def loss(genome: np.ndarray) -> float:
        return float(weights @ 4.0 ** -(problem.costs[problem.indices, genome] / problem.numels))

    model = SizeModel(problem, memory=8)
    for generation in range(4):
        assert model.ready == (generation >= 2)
        genomes = list(random_genomes(problem, 64, rng))
        model.learn(genomes, np.log([loss(genome) for genome in genomes]).tolist())
    fresh = list(random_genomes(problem, 100, rng))
    truth = np.argsort(np.argsort([loss(genome) for genome in fresh]))
    guess = np.argsort(np.argsort(model.predict(fresh)))
    assert np.corrcoef(truth, guess)[0, 1] > 0.9
