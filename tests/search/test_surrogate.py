import numpy as np
import pytest

from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.search.evolution import EvoPress
from evosweep.search.surrogate import Surrogate


def test_it_drops_the_worse_half_once_it_has_seen_enough(problem: Problem) -> None:
    weights = np.random.default_rng(3).normal(size=len(problem.units))
    search, surrogate = EvoPress(problem, seed=0, offspring=32), Surrogate(problem, share=0.5)
    parent = problem.uniform()
    for generation in range(1, 11):
        genomes = search.offspring(generation=generation, parents=[parent])
        if generation <= 2:
            assert surrogate.promising(genomes) == list(range(32))
        surrogate.learn(genomes, [100 * generation + float(genome @ weights) for genome in genomes])
    genomes = search.offspring(generation=11, parents=[parent])
    kept, scores = surrogate.promising(genomes), np.array([genome @ weights for genome in genomes])
    assert len(kept) == 16 and kept == sorted(kept) and int(scores.argmin()) in kept
    assert scores[kept].mean() < np.delete(scores, kept).mean() - scores.std()


def test_scores_that_are_no_numbers_teach_nothing(problem: Problem) -> None:
    surrogate = Surrogate(problem, share=0.5)
    genomes = EvoPress(problem, seed=0, offspring=4).offspring(generation=1, parents=[problem.uniform()])
    for _ in range(4):
        surrogate.learn(genomes, [np.nan, np.inf, np.nan, 1.0])
    assert surrogate.promising(genomes) == [0, 1, 2, 3]


@pytest.mark.parametrize("share", [0, 1, "half"])
def test_a_share_lies_between_none_and_all(problem: Problem, share) -> None:
    with pytest.raises(SettingError, match=r"surrogate"):
        Surrogate(problem, share=share)
