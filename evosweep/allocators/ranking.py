"""Allocators that drop units in the order of one column, lowest first, until the budget holds."""

import numpy as np

from evosweep.allocators.base import column
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem

LOSS_ALONE = "loss_alone"


class _Ranking:
    """Drops units by one column, lowest first."""

    name: str
    columns: tuple[str, ...]

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if some unit cannot be dropped, and so has no rank."""
        if problem.least or problem.gating.any():
            raise SettingError(
                "",
                owner=self,
                allowed="one that chooses levels (this one only drops: compressor=none drop=sublayers)",
                got=self.name,
            )

    def allocate(self, problem: Problem) -> Genome:
        """Return the genome that drops the lowest-ranked units until the budget holds, and keeps all others."""
        ranks = column(problem, self.columns[0])
        genome = problem.sizes - 1
        for unit in np.argsort(ranks, kind="stable"):
            if problem.feasible(genome):
                break
            genome[unit] = 0
        return genome


class BlockInfluence(_Ranking):
    """ShortGPT (Men et al., arXiv 2403.03853): 1 − cosine of the residual stream with and without the unit."""

    name = "block_influence"
    columns = ("influence",)


class LeaveOneOut(_Ranking):
    """Shortened LLaMA (Kim et al., arXiv 2402.02834): perplexity with only this unit dropped."""

    name = "leave_one_out"
    columns = (LOSS_ALONE,)
