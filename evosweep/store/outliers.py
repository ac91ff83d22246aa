"""Shares of outlier weights, which OWL allocates by."""

from collections.abc import Mapping

import torch

from evosweep.allocators.owl import MULTIPLES


def outlier_ratios(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Return each layer's share of outlier weights, for several multiples M.

    A weight is an outlier if |W_ij|·‖X_j‖₂ is above M times the mean over the whole block, so that the
    numel-weighted mean over a block's layers is OWL's D_b (arXiv 2310.05175, section 4).

    Args:
        layers: Name -> (weight (out, in), mean square of each input (in,)) of all linear layers of one block.
    """
    scores = {name: weight.float().abs() * square.sqrt() for name, (weight, square) in layers.items()}
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores.values()) / sum(
        score.numel() for score in scores.values()
    )
    return {
        name: {f"outlier_ratio_m{multiple}": float((score > multiple * mean).float().mean()) for multiple in MULTIPLES}
        for name, score in scores.items()
    }
