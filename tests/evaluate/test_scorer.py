import numpy as np
import pytest

from evosweep.evaluate.scorer import StagedScorer
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.search.racing import Racing
from evosweep.search.survival import Race, ScoreAll

STAGE = {"generation": 1, "stage": 0}


@pytest.fixture
def scorer(evaluator) -> StagedScorer:
    return StagedScorer(evaluator, fitness=KL(), seed=0)


def genomes_of(store, count: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, [len(unit.levels) for unit in store.units]) for _ in range(count)])


@pytest.mark.parametrize("fitness", [KL(), Perplexity()])
def test_losses_of_a_stage_s_windows_are_what_its_score_is_made_of(store, evaluator, fitness) -> None:
    scorer, genomes = StagedScorer(evaluator, fitness=fitness, seed=0), genomes_of(store, 3)
    parts = [
        scorer.losses(genomes, **STAGE, tokens=256, windows=windows, length=scorer.seq_len)
        for windows in (slice(0, 3), slice(3, 8))
    ]
    losses = np.concatenate(parts, axis=1)
    assert losses.shape == (3, 8, scorer.seq_len - 1)
    whole = scorer.score(genomes, **STAGE, tokens=256)
    assert [scorer.reduce(mean) for mean in losses.mean(axis=(1, 2), dtype=np.float64)] == pytest.approx(
        whole, rel=1e-5
    )


def test_score_all_takes_every_search_token_and_a_limit_some_of_them(store, evaluator, scorer, monkeypatch) -> None:
    genomes, split = genomes_of(store, 4), evaluator.splits["search"]
    whole = evaluator.score(genomes, split="search", windows=range(len(split.windows)), fitness=[KL()])["kl"]
    assert scorer.score_all(genomes) == pytest.approx(whole, rel=1e-5)
    assert scorer.final_tokens() == scorer.final_tokens(10**9) == split.tokens
    monkeypatch.setattr("evosweep.evaluate.scorer.CHUNK", 3 * scorer.seq_len)  # chunks change nothing
    assert scorer.score_all(genomes, limit=10**9) == pytest.approx(whole, rel=1e-5)
    assert scorer.final_tokens(100) == 96 and scorer.final_tokens(1) == 32
    some = scorer.score_all(genomes, limit=100)
    assert (some == scorer.score_all(genomes, limit=127)).all() and (np.abs(some / whole - 1) > 1e-4).any()


def test_a_race_keeps_whom_a_whole_stage_keeps_and_saves_tokens(store, scorer) -> None:
    """Levels from 2 to 4 bits everywhere, and mutants near the best: the bad ones are given up, the best are not."""
    top = np.array([len(unit.levels) - 1 for unit in store.units])
    genomes = np.stack([np.where(np.arange(len(top)) < count, 0, top) for count in range(len(top))])
    place = {**STAGE, "tokens": 32 * scorer.seq_len, "survivors": 3}
    full = ScoreAll().run(genomes, scorer=scorer, **place)
    raced = Race(Racing(0.2)).run(genomes, scorer=scorer, **place)
    stayed = np.flatnonzero(~raced.given_up)
    assert set(np.argsort(full.scores)[:3]) <= set(stayed) and 3 <= len(stayed) < len(genomes)
    assert raced.tokens < 0.9 * full.tokens == 0.9 * len(genomes) * place["tokens"]
    if len(stayed) > 3:  # they were scored on everything
        assert raced.scores[stayed] == pytest.approx(full.scores[stayed], rel=1e-5)
    assert set(raced.order()[:3]) == set(full.order()[:3])
