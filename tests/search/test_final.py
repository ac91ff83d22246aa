import numpy as np
import pytest

from evosweep.allocators.uniform import Uniform
from evosweep.core.errors import EvosweepError
from evosweep.core.events import FinalRecord
from evosweep.core.problem import Problem
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.static import AllocatorSampler
from evosweep.search.final import distinct_elites
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan

STAGES = [{"survivors": 3, "tokens": 8}, {"survivors": 1, "tokens": 16}]


class Fooled:
    """Fitness on few tokens leads away from what all tokens say: levels of some units help there only by chance.

    ``true`` is the sum over all tokens; a stage sees a part of it that is tilted, more so with every generation.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        rng = np.random.default_rng(5)
        self.weights, self.tilt = rng.normal(size=(2, len(problem.units)))
        self.final_calls: list[tuple[int, int | None]] = []
        self.flat = False

    def true(self, genomes: np.ndarray) -> np.ndarray:
        return 50 + genomes @ self.weights * (not self.flat)

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        del stage, tokens
        return self.true(genomes) + genomes @ self.tilt * generation / 2

    def score_all(self, genomes, *, limit: int | None):
        self.final_calls.append((len(genomes), limit))
        return self.true(genomes)

    def final_tokens(self, limit: int | None) -> int:
        return 1000 if limit is None else min(limit, 1000)

    def validate(self, genome):
        return {"kl": float(self.true(genome[None])[0]) / 10, "ppl": float(genome.sum())}


def search(problem: Problem, scorer: Fooled, *, final: bool | int, sampler=None, **settings):
    return run_search(
        name="x",
        sampler=sampler or EvoPressSampler(problem, seed=0, offspring=8),
        scorer=scorer,
        plan=Plan.of(generations=12, stages=STAGES, final=final, **settings),
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=[],
    )


def test_the_best_elite_on_all_tokens_wins_where_the_last_is_worse(problem: Problem) -> None:
    scorer = Fooled(problem)
    plain, result = search(problem, scorer, final=False), search(problem, scorer, final=True)
    assert [r.elite for r in plain.generations] == [r.elite for r in result.generations]
    true = {r.generation: float(scorer.true(problem.encode(r.elite)[None])[0]) for r in result.generations}
    best = min(true, key=true.__getitem__)
    assert true[best] < true[12] and best not in (0, 12), "the search was not fooled"
    assert result.winner_generation == best
    assert result.allocation == result.generations[best].elite != plain.allocation
    assert result.validation == result.generations[best].validation
    assert result.row()["kl"] == pytest.approx(true[best] / 10)
    assert result.cost == result.generations[best].cost


def test_every_distinct_elite_and_the_start_are_scored_once_and_counted(problem: Problem) -> None:
    scorer = Fooled(problem)
    plain, result = search(problem, scorer, final=False), search(problem, scorer, final=True)
    elites = list(dict.fromkeys(record.elite for record in result.generations))
    assert result.final is not None and plain.final is None
    assert scorer.final_calls == [(len(elites), None)] and len(elites) > 3
    assert 0 in result.final.scores and list(result.final.scores) == distinct_elites(result.generations)
    assert result.final.tokens == 1000 and result.final.spent == 1000 * len(elites)
    assert result.tokens == plain.tokens + result.final.spent == result.generations[-1].tokens + result.final.spent
    for generation, score in result.final.scores.items():
        assert score == scorer.true(problem.encode(result.generations[generation].elite)[None])[0]


def test_a_number_bounds_the_tokens_of_the_final_scoring(problem: Problem) -> None:
    scorer = Fooled(problem)
    result = search(problem, scorer, final=64)
    assert result.final is not None and result.final.tokens == 64 and scorer.final_calls[0][1] == 64


def test_of_equals_the_earliest_wins(problem: Problem) -> None:
    scorer = Fooled(problem)
    scorer.flat = True
    result = search(problem, scorer, final=True)
    assert len(result.final.scores) > 2 and result.winner_generation == 0
    assert result.allocation == result.generations[0].elite
    assert FinalRecord({7: 1.0, 2: 1.0, 4: 3.0}, tokens=1, spent=3).winner == 2


def test_a_search_of_one_candidate_or_one_elite_scores_nothing_more(problem: Problem) -> None:
    scorer = Fooled(problem)
    result = search(problem, scorer, final=True, sampler=AllocatorSampler(problem, allocator=Uniform()))
    assert result.final is None and scorer.final_calls == [] and result.tokens == 0
    assert result.winner_generation == 0


def test_without_the_final_scoring_the_winner_s_generation_is_where_it_became_the_elite(problem: Problem) -> None:
    result = search(problem, Fooled(problem), final=False, patience=3)
    assert result.generations[result.winner_generation].elite == result.allocation == result.generations[-1].elite
    assert result.generations[result.winner_generation - 1].elite != result.allocation


@pytest.mark.parametrize("broken", [slice(None), slice(0, 1)])
def test_elites_whose_final_fitness_is_nan_do_not_win(problem: Problem, broken: slice) -> None:
    class Broken(Fooled):
        def score_all(self, genomes, *, limit: int | None):
            scores = super().score_all(genomes, limit=limit)
            scores[broken] = np.nan
            return scores

    if broken == slice(None):
        with pytest.raises(EvosweepError, match=r"the final fitness of all \d+ elites is NaN"):
            search(problem, Broken(problem), final=True)
    else:
        assert search(problem, Broken(problem), final=True).winner_generation != 0
