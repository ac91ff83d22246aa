import json
from dataclasses import replace

import numpy as np
import pytest

from evosweep.core.events import Candidate
from evosweep.core.problem import Problem
from evosweep.samplers.random import RandomFeasibleSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.tracking.artifacts.additivity import Additivity, Sample, samples_of, statistics


class Scorer:
    """Fitness that is the sum of layer errors, or its opposite."""

    def __init__(self, problem: Problem, sign: float) -> None:
        self.errors = np.array([[level.relative_error for level in unit.levels] for unit in problem.units])
        self.sign = sign

    def score(self, genomes, **_):
        return 10 + self.sign * np.array([self.errors[np.arange(len(g)), g].sum() for g in genomes])

    def validate(self, genome):
        return {"kl": 1.0, "ppl": 2.0}


def searched(problem: Problem, sign: float):
    plan = Plan.of(generations=3, stages=[{"survivors": 1, "tokens": 8}])
    return run_search(
        name="x",
        sampler=RandomFeasibleSampler(problem, offspring=8),
        scorer=Scorer(problem, sign),
        plan=plan,
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=[],
    )


@pytest.mark.parametrize(("sign", "violated"), [(1.0, 0.0), (-1.0, 100.0)])
def test_a_premise_that_holds_and_one_that_does_not(problem: Problem, tmp_path, sign: float, violated: float) -> None:
    Additivity()(searched(problem, sign), tmp_path)
    figures = json.loads((tmp_path / "additivity.json").read_text())
    assert figures["violations_percent"] == violated and figures["pearson"] == pytest.approx(sign)
    assert (tmp_path / "additivity.png").stat().st_size > 5_000


def test_pairs_are_counted_within_a_generation() -> None:
    first = Sample(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    second = Sample(np.array([10.0, 20.0]), np.array([0.1, 0.2]))  # other tokens: lower than all of the first
    assert statistics([first, second])["violations_percent"] == pytest.approx(25.0)


def test_what_was_not_scored_or_has_no_error_says_nothing(problem: Problem, tmp_path) -> None:
    result = searched(problem, 1.0)
    unscored = tuple(
        replace(each, candidates=tuple(Candidate(c.slot, c.genome) for c in each.candidates))
        for each in result.generations
    )
    Additivity()(replace(result, generations=unscored), tmp_path)
    assert list(tmp_path.iterdir()) == [] and samples_of(replace(result, generations=())) == []
