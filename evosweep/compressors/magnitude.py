"""Magnitude pruning: the largest weights of a layer stay."""

from collections.abc import Mapping

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.payload import Payload
from evosweep.compressors.sparse import SparseLevels, SparseSpec, keep_largest, keep_pattern, payload_of
from evosweep.compressors.statistics import Statistics


class Magnitude(SparseLevels):
    """Keeps the largest |W_ij| of each layer.

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit.
        patterns: N:M patterns that are the levels instead, such as ``2:4``.
    """

    needs: frozenset[str] = frozenset()

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers pruned by magnitude.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: Not read: no statistic is needed.
            plans: What ``plan`` returned.
        """
        del statistics
        return {
            name: {level.name: payload_of(weight, _mask(weight.abs(), level.spec)) for level in plans[name]}
            for name, weight in weights.items()
        }


def _mask(scores: torch.Tensor, spec: SparseSpec) -> torch.Tensor:
    return keep_largest(scores, spec.kept) if spec.pattern is None else keep_pattern(scores, spec.pattern)
