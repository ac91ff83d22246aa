import itertools

import numpy as np
import optuna
import pytest

from evosweep.allocators.ilp import ILP
from evosweep.core.errors import SettingError
from evosweep.core.events import Candidate
from evosweep.core.problem import Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.two_objectives import TwoObjectivesSampler, front_of, hypervolume, nsga2_order
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.search.selection_stages import Stages
from evosweep.testing import SamplerContract
from evosweep.testing.problems import make_problem

optuna.logging.set_verbosity(optuna.logging.ERROR)


class TestTwoObjectivesSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return TwoObjectivesSampler(problem, seed=seed, offspring=4, population_size=3)


class TestWarmTwoObjectivesSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return TwoObjectivesSampler(problem, seed=seed, offspring=4, population_size=3, start=ILP())


def test_order_and_front_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    sizes, losses = rng.integers(0, 8, 40).astype(float), rng.integers(0, 8, 40).astype(float)

    def dominated(index: int) -> bool:
        no_worse = (sizes <= sizes[index]) & (losses <= losses[index])
        return bool((no_worse & ((sizes < sizes[index]) | (losses < losses[index]))).any())

    best = {index for index in range(40) if not dominated(index)}
    points = {(sizes[index], losses[index]) for index in best}
    assert set(nsga2_order(sizes, losses)[: len(best)]) == best
    found = front_of(sizes, losses)
    assert {(sizes[index], losses[index]) for index in found} == points and len(found) == len(points)
    assert (np.diff(sizes[found]) < 0).all()


def test_hypervolume_is_the_dominated_share() -> None:
    sizes, losses = np.array([20.0, 60.0, 500.0]), np.array([0.8, 0.2, 0.0])
    # within (0..100, 0..1): 0.4 x 0.2 for the first alone, then 0.4 x 0.8 from 60 on; the third is too large
    assert hypervolume(sizes, losses, least=0, most=100, worst=1.0) == pytest.approx(0.4 * 0.2 + 0.4 * 0.8)
    assert hypervolume(np.array([200.0]), np.array([0.1]), least=0, most=100, worst=1.0) == 0


class Additive:
    """A scorer whose fitness is the sum of the units' errors, weighted."""

    seq_len = 8

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.weights = 1.0 + np.arange(len(problem.units)) % 5

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        del generation, stage, tokens
        return np.array([self.loss(genome) for genome in genomes])

    def loss(self, genome) -> float:
        errors = [unit.levels[level].error for unit, level in zip(self.problem.units, genome, strict=True)]
        return float(self.weights @ np.array(errors))

    def validate(self, genome) -> dict[str, float]:
        return {"kl": self.loss(genome), "ppl": 1.0}


def search(sampler: PopulationSampler, generations: int):
    stages = Stages.of([{"survivors": 12, "tokens": 8}, {"survivors": 1, "tokens": 16}])
    plan = Plan(generations=generations, stages=stages)
    dense = {"kl": 0.0, "ppl": 1.0}
    return run_search(name="t", sampler=sampler, scorer=Additive(sampler.problem), plan=plan, dense=dense, listeners=())


def exact(problem: Problem) -> list[tuple[int, float]]:
    """Return the Pareto front over all sizes, by dynamic programming over units."""
    scorer = Additive(problem)
    points = {0: 0.0}
    for unit, weight in zip(problem.units, scorer.weights, strict=True):
        grown: dict[int, float] = {}
        for (size, loss), level in itertools.product(points.items(), unit.levels):
            key = size + level.cost
            grown[key] = min(grown.get(key, np.inf), loss + weight * level.error)
        points = grown
    return [(size, loss) for size, loss in points.items() if size <= problem.budget]


def test_it_comes_near_the_exact_front_and_nearer_with_every_generation() -> None:
    problem = make_problem(make_problem().most)
    result = search(TwoObjectivesSampler(problem, seed=0, offspring=32, population_size=16), 25)
    volumes = [record.facts["hypervolume"] for record in result.generations]
    assert volumes[-1] > volumes[0]
    every = exact(problem)
    worst = max(score for c in result.generations[0].candidates for score in c.scores.values())
    best = hypervolume(
        np.array([size for size, _ in every], dtype=float),
        np.array([loss for _, loss in every]),
        least=problem.least,
        most=problem.budget,
        worst=worst,
    )
    assert 0.95 * best <= volumes[-1] <= best + 1e-9
    sizes = [problem.cost(genome) for genome in result.generations[-1].parents]
    assert len(set(sizes)) >= 8 and result.cost == max(sizes)


def test_the_elite_is_as_good_as_a_search_at_that_size_alone() -> None:
    problem = make_problem()
    two = search(TwoObjectivesSampler(problem, seed=0, offspring=32, population_size=8), 20)
    one = search(EvoPressSampler(problem, seed=0, offspring=32), 20)
    assert two.validation["kl"] <= 1.02 * one.validation["kl"]


def test_screening_keeps_as_many_as_a_generation_has_and_none_twice() -> None:
    problem = make_problem()
    sampler = TwoObjectivesSampler(problem, seed=0, offspring=8, population_size=4)
    scorer = Additive(problem)
    parents: list = []
    for generation in range(4):
        found = sampler.population(generation=generation, parents=parents)
        scored = [Candidate(slot=c.slot, genome=c.genome, scores={0: scorer.loss(c.genome)}) for c in found]
        sampler.learn(scored)
        order = sampler.order([c.genome for c in found], np.array([c.scores[0] for c in scored]))
        parents = [found[index].genome for index in order[:4]]
    names = {c.genome.tobytes() for c in found}
    assert len(names) == len(found) == 8


@pytest.mark.parametrize(
    "settings", [{"smallest": 1.5}, {"population_size": 1}, {"resize": 0.9, "cross": 0.3}, {"start": "allocation.json"}]
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(SettingError):
        TwoObjectivesSampler(make_problem(), **settings)
