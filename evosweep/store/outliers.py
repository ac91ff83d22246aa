"""Shares of outlier weights, which OWL allocates by."""

from collections.abc import Callable, Mapping

import torch

from evosweep.allocators.owl import MULTIPLES

Weight = Callable[[], torch.Tensor]


def outlier_ratios(layers: Mapping[str, tuple[Weight, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Return each layer's share of outlier weights, for several multiples M.

    A weight is an outlier if |W_ij|·‖X_j‖₂ is above M times the mean over the whole block, so that the
    numel-weighted mean over a block's layers is OWL's D_b (arXiv 2310.05175, section 4). One layer at a time is in
    memory in fp32: a mixture's block may hold billions of weights.

    Args:
        layers: Name -> (function that returns the weight (out, in), mean square of each input (in,)) of all linear
            layers of one block.
    """
    total = 0.0
    count = 0
    for weight, square in layers.values():
        score = _score(weight, square)
        total += float(score.sum(dtype=torch.float64))
        count += score.numel()
    found = {}
    for name, (weight, square) in layers.items():
        score = _score(weight, square)
        bounds = {f"outlier_ratio_m{multiple}": multiple * (total / count) for multiple in MULTIPLES}
        found[name] = {column: float((score > bound).float().mean()) for column, bound in bounds.items()}
    return found


def _score(weight: Weight, square: torch.Tensor) -> torch.Tensor:
    """Return |W_ij| times the root of the mean square of input j, shape (out, in)."""
    return weight().to(square.device).float().abs() * square.sqrt()
