"""The final choice: all elites of a search, scored once more on common tokens, and the best of them.

A generation's elite is chosen on that generation's tokens, so the last one need not be the best: a short search fits
its tokens. Scoring all elites on every search token before choosing costs little on a GPU, and the search then never
ends worse than it began, as far as its own tokens can tell.
"""

from collections.abc import Sequence

import numpy as np

from evosweep.core.errors import EvosweepError
from evosweep.core.events import FinalRecord, GenerationRecord
from evosweep.core.problem import Problem
from evosweep.search.protocols import Scorer


def distinct_elites(records: Sequence[GenerationRecord]) -> list[int]:
    """Return the generations in which an elite appeared for the first time, rising."""
    first: dict[str, int] = {}
    for record in records:
        first.setdefault(record.elite.hash, record.generation)
    return sorted(first.values())


def score_elites(
    records: Sequence[GenerationRecord], *, problem: Problem, scorer: Scorer, limit: int | None
) -> FinalRecord | None:
    """Return what the elites of a search score on common tokens; None if there is one elite only.

    Args:
        records: All generations.
        problem: Encodes their elites.
        scorer: Scores.
        limit: Most tokens for each elite; None: every search token.

    Raises:
        EvosweepError: No elite's fitness is a number.
    """
    generations = distinct_elites(records)
    if len(generations) < 2:
        return None
    genomes = np.stack([problem.encode(records[generation].elite) for generation in generations])
    scores = scorer.score_all(genomes, limit=limit)
    if np.isnan(scores).all():
        raise EvosweepError(f"the final fitness of all {len(genomes)} elites is NaN")
    scores = np.where(np.isnan(scores), np.inf, scores)
    tokens = scorer.final_tokens(limit)
    return FinalRecord(
        scores=dict(zip(generations, map(float, scores), strict=True)), tokens=tokens, spent=tokens * len(genomes)
    )
