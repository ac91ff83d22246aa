"""Same seed, same search: what every sampler proposed and chose when these files were made, it still does."""

import json
from pathlib import Path

import numpy as np
import pytest

from evosweep.allocators.dp import DP
from evosweep.allocators.greedy import Greedy
from evosweep.allocators.ilp import ILP
from evosweep.allocators.owl import OWL
from evosweep.allocators.uniform import Uniform
from evosweep.core.files import digest
from evosweep.core.problem import Problem
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.random import RandomFeasibleSampler
from evosweep.samplers.static import AllocatorSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.testing.problems import make_problem

GOLDEN = Path(__file__).parent / "golden" / "searches.json"
STAGES = [{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}]


class Interacting:
    """Fitness whose units interact, so that a search has something to find; the same numbers on every machine."""

    def __init__(self, problem: Problem) -> None:
        size = len(problem.units)
        self.linear = (np.arange(size) * 7) % 11 - 5
        self.pairs = (np.arange(size)[:, None] * np.arange(size)[None]) % 5 - 2

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        quadratic = np.einsum("ni,ij,nj->n", genomes, self.pairs, genomes)
        wobble = ((genomes * (3 + generation + 2 * stage)).sum(axis=1) % 3) / 8
        return 1000.0 - genomes @ self.linear + quadratic / 4 + wobble

    def validate(self, genome):
        return {"kl": float(self.score(genome[None], generation=0, stage=0, tokens=1)[0]), "ppl": 1.0}


SAMPLERS = {
    "evopress": lambda problem: EvoPressSampler(problem, seed=3, offspring=12),
    "evopress paper": lambda problem: EvoPressSampler(problem, seed=0, offspring=8, cross=0.0),
    "evopress names": lambda problem: EvoPressSampler(problem, seed=1, offspring=8, group="name", flips="uniform"),
    "evopress two parents": lambda problem: EvoPressSampler(problem, seed=5, offspring=10, population_size=2),
    "evopress from ilp": lambda problem: EvoPressSampler(problem, seed=2, offspring=8, start=ILP()),
    "random": lambda problem: RandomFeasibleSampler(problem, seed=4, offspring=8),
    "ilp": lambda problem: AllocatorSampler(problem, allocator=ILP()),
    "dp": lambda problem: AllocatorSampler(problem, allocator=DP()),
    "greedy": lambda problem: AllocatorSampler(problem, allocator=Greedy()),
    "owl": lambda problem: AllocatorSampler(problem, allocator=OWL()),
    "uniform": lambda problem: AllocatorSampler(problem, allocator=Uniform()),
}
BUDGETS = {"at a level": None, "between levels": 5700}


def searched(name: str, budget: int | None) -> dict[str, object]:
    """Run a search and return what it proposed (a hash) and what was best after every generation."""
    problem = make_problem(budget)
    plan = Plan.of(generations=5, stages=STAGES)
    result = run_search(
        name="golden",
        sampler=SAMPLERS[name](problem),
        scorer=Interacting(problem),
        plan=plan,
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=[],
    )
    return {
        "proposed": digest([[c.genome.tolist() for c in each.candidates] for each in result.generations]),
        "elites": ["".join(map(str, problem.encode(each.elite).tolist())) for each in result.generations],
    }


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_search_is_the_one_that_was_recorded(name: str, budget: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert searched(name, BUDGETS[budget]) == golden[f"{name}, {budget}"]
