"""Screening: a ridge model of what the search has scored so far drops unpromising offspring before any token.

SimQ-NAS (Kundu et al., arXiv 2312.13301) screens candidates by light predictors, too.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_number
from evosweep.core.events import Candidate
from evosweep.core.problem import Genome, Problem

Floats = npt.NDArray[np.float64]
PENALTY = 1.0
MOST = 0.95  # largest share of a generation that may be dropped
MEMORY = 40  # generations that the model is fitted to
LEAST = 2  # generations before the model is used


class Surrogate:
    """Ridge regression of a generation's first-stage scores on its genomes' levels, one-hot.

    Every generation has other tokens, so scores are standardized within it: what is learned is which genomes score
    better than others.

    Args:
        problem: Units and their levels.
        share: Share of a generation that is dropped unscored.

    Raises:
        SettingError: ``share`` is not above 0 and at most 0.95.
    """

    def __init__(self, problem: Problem, *, share: float) -> None:
        self.share = check_number("surrogate", share, low=0, high=MOST, exclusive=True)
        self._starts = np.concatenate([[0], np.cumsum(problem.sizes)[:-1]])
        self._width = int(problem.sizes.sum())
        self._seen: deque[tuple[Floats, Floats]] = deque(maxlen=MEMORY)

    def learn(self, genomes: Sequence[Genome], scores: Sequence[float]) -> None:
        """Add one generation's scores to the data; those that are not finite are left out."""
        values = np.asarray(scores, dtype=np.float64)
        rows = self._features(genomes)
        finite = np.isfinite(values)
        values, rows = values[finite], rows[finite]
        if len(values) > 1 and values.std() > 0:
            self._seen.append((rows - rows.mean(axis=0), (values - values.mean()) / values.std()))

    def learn_from(self, candidates: Sequence[Candidate]) -> None:
        """Add one generation's candidates by their first stage's scores; those without a score are left out."""
        scored = [candidate for candidate in candidates if candidate.scores and candidate.duplicate_of is None]
        self.learn(
            [candidate.genome for candidate in scored],
            [candidate.scores[min(candidate.scores)] for candidate in scored],
        )

    def promising(self, genomes: Sequence[Genome]) -> list[int]:
        """Return the indices of genomes to be scored, rising; all of them while too little is known."""
        if not self.ready or len(genomes) < 2:
            return list(range(len(genomes)))
        kept = max(1, round((1 - self.share) * len(genomes)))
        return sorted(np.argsort(self.predict(genomes), kind="stable")[:kept].tolist())

    @property
    def ready(self) -> bool:
        """Whether enough generations were learned."""
        return len(self._seen) >= LEAST

    def predict(self, genomes: Sequence[Genome]) -> Floats:
        """Return what genomes would score within a generation, in its standard deviations, shape (genomes,)."""
        rows = np.concatenate([rows for rows, _ in self._seen])
        values = np.concatenate([values for _, values in self._seen])
        weights = np.linalg.solve(rows.T @ rows + PENALTY * np.eye(self._width), rows.T @ values)
        return np.asarray(self._features(genomes) @ weights, dtype=np.float64)

    def _features(self, genomes: Sequence[Genome]) -> Floats:
        """Return one-hot levels, shape (genomes, levels of all units)."""
        rows = np.zeros((len(genomes), self._width))
        for row, genome in zip(rows, genomes, strict=True):
            row[self._starts + genome] = 1
        return rows


@dataclass(frozen=True)
class Screening:
    """The strategy of dropping the least promising ``share`` of each generation unscored."""

    share: float

    def __post_init__(self) -> None:
        check_number("surrogate", self.share, low=0, high=MOST, exclusive=True)

    def start(self, problem: Problem) -> Surrogate:
        """Return the model of a search that begins."""
        return Surrogate(problem, share=self.share)
