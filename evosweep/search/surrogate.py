"""Pre-screening: a ridge model of what the search has scored so far drops unpromising offspring before any token.

SimQ-NAS (Kundu et al., arXiv 2312.13301) screens candidates with light predictors alike.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_number
from evosweep.core.problem import Genome, Problem

Floats = npt.NDArray[np.float64]
PENALTY = 1.0
MOST = 0.95  # of a generation may be dropped
MEMORY = 40  # generations that it learns from
LEAST = 2  # generations before it has a say


class Surrogate:
    """Ridge regression of a generation's first-stage scores on its genomes' levels, one-hot.

    Every generation has other tokens, so scores are standardized within it: what is learned is who beats whom.

    Args:
        problem: Units and ladders.
        share: Of a generation, dropped unscored.
    """

    def __init__(self, problem: Problem, *, share: float) -> None:
        self.share = check_number("surrogate", share, low=0, high=MOST, exclusive=True)
        self._starts = np.concatenate([[0], np.cumsum(problem.sizes)[:-1]])
        self._width = int(problem.sizes.sum())
        self._seen: deque[tuple[Floats, Floats]] = deque(maxlen=MEMORY)

    def learn(self, genomes: Sequence[Genome], scores: Sequence[float]) -> None:
        """Take note of one generation's scores; those that are no numbers are passed over."""
        values, rows = np.asarray(scores, dtype=np.float64), self._features(genomes)
        fine = np.isfinite(values)
        values, rows = values[fine], rows[fine]
        if len(values) > 1 and values.std() > 0:
            self._seen.append((rows - rows.mean(axis=0), (values - values.mean()) / values.std()))

    def promising(self, genomes: Sequence[Genome]) -> list[int]:
        """Return the places of those to be scored, in order; all of them while too little is known."""
        if len(self._seen) < LEAST or len(genomes) < 2:
            return list(range(len(genomes)))
        rows = np.concatenate([rows for rows, _ in self._seen])
        values = np.concatenate([values for _, values in self._seen])
        weights = np.linalg.solve(rows.T @ rows + PENALTY * np.eye(self._width), rows.T @ values)
        kept = max(1, round((1 - self.share) * len(genomes)))
        return sorted(np.argsort(self._features(genomes) @ weights, kind="stable")[:kept].tolist())

    def _features(self, genomes: Sequence[Genome]) -> Floats:
        rows = np.zeros((len(genomes), self._width))
        for row, genome in zip(rows, genomes, strict=True):
            row[self._starts + genome] = 1
        return rows
