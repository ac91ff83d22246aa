"""Strategies that score the candidates of a stage: all on every token, or as a race."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evosweep.search.protocols import Genomes, Scorer
from evosweep.search.racing import Look, Racing


@dataclass(frozen=True)
class Outcome:
    """Scores of a stage's candidates.

    Attributes:
        scores: Fitness, shape (candidates,); of those given up, on the tokens that they were scored on.
        given_up: Which candidates cannot survive, whatever their score, shape (candidates,).
        tokens: Tokens scored, summed over candidates.
    """

    scores: npt.NDArray[np.float64]
    given_up: npt.NDArray[np.bool_]
    tokens: int

    def order(self) -> npt.NDArray[np.int64]:
        """Return candidate indices, best first; those given up come last, ties keep their order."""
        return np.lexsort((self.scores, self.given_up))


class Survival(Protocol):
    """Strategy that scores a stage's candidates; pass one of your own as ``Plan(survival=...)``.

    Its ``repr`` is stored with a search's state: one with other settings cannot continue the search.
    """

    def run(
        self, genomes: Genomes, *, scorer: Scorer, generation: int, stage: int, tokens: int, survivors: int
    ) -> Outcome:
        """Score the candidates of a stage.

        Args:
            genomes: Level indices, shape (candidates, units).
            scorer: Gives losses and fitness.
            generation: Generation whose tokens are used.
            stage: Index of the stage.
            tokens: Tokens that the stage may score a candidate on.
            survivors: How many candidates go on.
        """


@dataclass(frozen=True)
class ScoreAll:
    """Scores every candidate on all tokens of the stage."""

    def run(
        self, genomes: Genomes, *, scorer: Scorer, generation: int, stage: int, tokens: int, survivors: int
    ) -> Outcome:
        """Score every candidate of a stage on all of its tokens.

        Args:
            genomes: Level indices, shape (candidates, units).
            scorer: Gives losses and fitness.
            generation: Generation whose tokens are used.
            stage: Index of the stage.
            tokens: Tokens that the stage may score a candidate on.
            survivors: Not read.
        """
        del survivors
        scores = scorer.score(genomes, generation=generation, stage=stage, tokens=tokens)
        return Outcome(scores, np.zeros(len(genomes), dtype=bool), tokens * len(genomes))


@dataclass(frozen=True)
class Race:
    """Stops scoring candidates that can hardly survive any more.

    Args:
        racing: When a candidate is given up.
    """

    racing: Racing

    def run(
        self, genomes: Genomes, *, scorer: Scorer, generation: int, stage: int, tokens: int, survivors: int
    ) -> Outcome:
        """Score the candidates of a stage look by look, and give up the worst at each look.

        Args:
            genomes: Level indices, shape (candidates, units).
            scorer: Gives losses and fitness.
            generation: Generation whose tokens are used.
            stage: Index of the stage.
            tokens: Tokens that the stage may score a candidate on.
            survivors: How many candidates go on.
        """
        seq_len = scorer.seq_len
        spent = 0
        looks = self.racing.looks(tokens // seq_len, seq_len)
        boundary = self.racing.boundary(looks, candidates=len(genomes), survivors=survivors)
        scores = np.full(len(genomes), np.nan)
        alive = np.arange(len(genomes))
        losses = np.empty((len(genomes), 0, seq_len - 1), dtype=np.float32)
        for look in looks:
            windows = slice(losses.shape[1], look.windows)
            found = scorer.losses(
                genomes[alive],
                generation=generation,
                stage=stage,
                tokens=tokens,
                windows=windows,
                length=look.length,
            )
            spent += len(alive) * (windows.stop - windows.start) * look.length
            if look.length == seq_len:
                losses = np.concatenate([losses, found], axis=1)
            known = losses if look.length == seq_len else found
            scores[alive] = [scorer.reduce(mean) for mean in known.mean(axis=(1, 2), dtype=np.float64)]
            stays = self._stays(known, look, looks, survivors=survivors, boundary=boundary)
            alive, losses = alive[stays], losses[stays]
            if len(alive) <= survivors:
                break
        return Outcome(scores, ~np.isin(np.arange(len(genomes)), alive), spent)

    @staticmethod
    def _stays(
        losses: npt.NDArray[np.float32], look: Look, looks: Sequence[Look], *, survivors: int, boundary: float
    ) -> npt.NDArray[np.bool_]:
        """Return which candidates are scored further; after the last look, all that are left were.

        The test excludes each candidate for itself, with many places even where it ties. So where it leaves fewer
        than go on, the best of those that it excludes stay.
        """
        if look is looks[-1]:
            return np.ones(len(losses), dtype=bool)
        stays = ~Racing.excluded(losses, survivors, boundary=boundary)
        means = losses.mean(axis=(1, 2), dtype=np.float64)
        stays[np.lexsort((means, ~stays))[:survivors]] = True
        return stays
