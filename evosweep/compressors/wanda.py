"""Wanda (Sun et al., arXiv 2306.11695): weight times input norm, compared within each output row."""

from collections.abc import Mapping

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.payload import Payload
from evosweep.compressors.sparse import SparseLevels, SparseSpec, keep_pattern, payload_of
from evosweep.compressors.statistics import SECOND_MOMENT_DIAGONAL, Statistics


class Wanda(SparseLevels):
    """Keeps the largest |W_ij|·‖X_j‖₂ of each row; rows keep equally many weights, up to a difference of one.

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit.
        patterns: N:M patterns that are the levels instead, such as ``2:4``.
    """

    needs = frozenset({SECOND_MOMENT_DIAGONAL})

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The diagonal of the shared input's second moment.
            plans: What ``plan`` returned.
        """
        norms = statistics.second_moment_diagonal.sqrt()
        result = {}
        for name, weight in weights.items():
            scores = weight.abs() * norms
            ranks = torch.argsort(torch.argsort(scores, dim=1, descending=True, stable=True), dim=1)
            result[name] = {level.name: payload_of(weight, _mask(scores, ranks, level.spec)) for level in plans[name]}
        return result


def _mask(scores: torch.Tensor, ranks: torch.Tensor, spec: SparseSpec) -> torch.Tensor:
    return row_mask(ranks, spec.kept) if spec.pattern is None else keep_pattern(scores, spec.pattern)


def row_mask(ranks: torch.Tensor, kept: int) -> torch.Tensor:
    """Return a mask of exactly ``kept`` entries, those of lowest rank in each row.

    Where ``kept`` is not a multiple of the rows, the first rows keep one entry more.

    Args:
        ranks: Rank of each entry within its row, 0 the best, shape (rows, columns).
        kept: Entries kept in all rows together.
    """
    per_row, remainder = divmod(kept, len(ranks))
    limits = torch.full((len(ranks), 1), per_row, device=ranks.device)
    limits[:remainder] += 1
    return ranks < limits
