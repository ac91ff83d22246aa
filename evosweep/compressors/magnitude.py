"""Magnitude pruning: the largest weights of a layer stay."""

from collections.abc import Mapping

import torch

from evosweep.compressors.base import Payload, Plans
from evosweep.compressors.sparse import SparseLevels, keep_largest, payload_of


class Magnitude(SparseLevels):
    """Keeps the largest |W_ij| of each layer.

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit.
    """

    def __init__(self, *, sparsity: float = 0.5, window: float = 0.25, step: int | None = None) -> None:
        super().__init__(sparsity=sparsity, window=window, step=step)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload; ``gram`` is not looked at."""
        del gram
        return {
            name: {plan.name: payload_of(weight, keep_largest(weight.abs(), plan.kept)) for plan in plans[name]}
            for name, weight in weights.items()
        }
