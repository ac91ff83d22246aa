"""A light model of losses at all sizes: which of many proposals are worth a token, as SimQ-NAS's predictors."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem

Floats = npt.NDArray[np.float64]
PENALTY = 1.0
LEAST = 2  # generations before the model is used


class SizeModel:
    """Ridge regression of the logarithm of losses on one number a unit: 2 to the power of minus its bits a weight.

    Rounding to b bits leaves an error that falls about as 4^-b, and the loss's logarithm falls slower than that, so
    2^-b is nearly linear in it. One number a unit instead of one a level keeps the fit small: it is made once a
    generation. Every generation has other tokens, so losses are standardized within it.

    Args:
        problem: Units and their levels.
        memory: Generations that it is fitted to.
    """

    def __init__(self, problem: Problem, *, memory: int) -> None:
        bits = np.maximum(problem.costs, 0) / np.maximum(problem.numels, 1)[:, None]
        values = np.exp2(-bits)
        weight = np.sqrt(problem.numels / problem.numels.mean())[:, None]  # large units are believed to matter more
        self._values = (values * weight).ravel()
        self._offsets = np.arange(len(problem.units)) * problem.costs.shape[1]
        self._seen: deque[tuple[Floats, Floats, Floats]] = deque(maxlen=memory)
        self._weights: Floats | None = None

    @property
    def ready(self) -> bool:
        """Whether enough generations were learned."""
        return len(self._seen) >= LEAST

    def learn(self, genomes: Sequence[Genome], losses: Sequence[float]) -> None:
        """Add one generation's losses; those that are not finite are left out.

        Args:
            genomes: Shape (units,) each.
            losses: Their logarithms.
        """
        values = np.asarray(losses, dtype=np.float64)
        finite = np.isfinite(values)
        values = values[finite]
        if len(values) > 1 and values.std() > 0:
            rows = self._features([genome for genome, kept in zip(genomes, finite, strict=True) if kept])
            rows -= rows.mean(axis=0)
            values = (values - values.mean()) / values.std()
            self._seen.append((rows, values, rows.T @ rows))
            self._weights = None

    def predict(self, genomes: Sequence[Genome]) -> Floats:
        """Return what genomes would score within a generation, in its standard deviations, shape (genomes,)."""
        if self._weights is None:
            self._weights = self._fit()
        return np.asarray(self._features(genomes) @ self._weights, dtype=np.float64)

    def _fit(self) -> Floats:
        count = sum(len(rows) for rows, _, _ in self._seen)
        products = np.sum([product for _, _, product in self._seen], axis=0)
        moments = np.sum([values @ rows for rows, values, _ in self._seen], axis=0)
        penalty = PENALTY * max(float(np.trace(products)) / len(products), 1e-12) / count
        products[np.diag_indices_from(products)] += penalty
        return np.asarray(np.linalg.solve(products, moments))

    def _features(self, genomes: Sequence[Genome]) -> Floats:
        return np.asarray(self._values.take(np.stack(genomes) + self._offsets))
