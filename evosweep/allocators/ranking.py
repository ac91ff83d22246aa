"""Rankings of what to drop: the least missed first, until the budget holds."""

import numpy as np

from evosweep.allocators.base import column
from evosweep.core.problem import Genome, Problem

LOSS_ALONE = "loss_alone"


class _Ranking:
    """Drops units by one column, lowest first."""

    columns: tuple[str, ...]

    def allocate(self, problem: Problem) -> Genome:
        """Return everything at its highest level but the lowest-ranked units, dropped until the budget holds.

        Raises:
            StoreError: Some unit cannot be dropped, and so has no rank.
        """
        ranks = column(problem, self.columns[0])
        genome = problem.sizes - 1
        for unit in np.argsort(ranks, kind="stable"):
            if problem.feasible(genome):
                break
            genome[unit] = 0
        return genome


class BlockInfluence(_Ranking):
    """ShortGPT (Men et al., arXiv 2403.03853): 1 − cosine of the residual stream with and without the unit."""

    columns = ("influence",)


class LeaveOneOut(_Ranking):
    """Shortened LLaMA (Kim et al., arXiv 2402.02834): perplexity with only this unit dropped."""

    columns = (LOSS_ALONE,)
