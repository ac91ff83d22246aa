"""Wanda (Sun et al., arXiv 2306.11695): weight times input norm, compared within each output row."""

from collections.abc import Mapping, Sequence

import torch

from evosweep.compressors.base import Payload, Plans
from evosweep.compressors.sparse import SparseLevels, keep_in_groups, payload_of


class Wanda(SparseLevels):
    """Keeps the largest |W_ij|·‖X_j‖₂ of each row; all rows keep as many, up to one.

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit.
        patterns: N:M patterns that are the levels instead, such as ``2:4``.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        window: float = 0.25,
        step: int | None = None,
        patterns: Sequence[str] | None = None,
    ) -> None:
        super().__init__(sparsity=sparsity, window=window, step=step, patterns=patterns)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload."""
        norms = gram.diagonal().sqrt()
        result = {}
        for name, weight in weights.items():
            scores = weight.abs() * norms
            ranks = torch.argsort(torch.argsort(scores, dim=1, descending=True, stable=True), dim=1)
            result[name] = {
                plan.name: payload_of(
                    weight, keep_in_groups(scores, plan) if plan.group else row_mask(ranks, plan.kept)
                )
                for plan in plans[name]
            }
        return result


def row_mask(ranks: torch.Tensor, kept: int) -> torch.Tensor:
    """Return a mask of exactly ``kept`` entries, those of lowest rank in each row; the first rows keep what is over.

    Args:
        ranks: Place of each entry within its row, shape (rows, columns).
        kept: Entries kept in all rows together.
    """
    each, over = divmod(kept, len(ranks))
    limits = torch.full((len(ranks), 1), each, device=ranks.device)
    limits[:over] += 1
    return ranks < limits
