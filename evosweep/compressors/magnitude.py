"""Magnitude pruning: the largest weights of a layer stay."""

from collections.abc import Mapping, Sequence

import torch

from evosweep.compressors.base import LevelPlan, Payload, Plans
from evosweep.compressors.sparse import SparseLevels, keep_in_groups, keep_largest, payload_of


class Magnitude(SparseLevels):
    """Keeps the largest |W_ij| of each layer.

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
        """Return unit -> level name -> payload; ``gram`` is not looked at."""
        del gram
        return {
            name: {plan.name: payload_of(weight, _mask(weight.abs(), plan)) for plan in plans[name]}
            for name, weight in weights.items()
        }


def _mask(scores: torch.Tensor, plan: LevelPlan) -> torch.Tensor:
    return keep_in_groups(scores, plan) if plan.group else keep_largest(scores, plan.kept)
