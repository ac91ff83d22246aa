"""Estimates from the eigenvalues of a weight's Gram matrix, without data."""

import torch


def hill_exponent(weight: torch.Tensor) -> float:
    """Return the Hill estimate of the power law's exponent in the upper half of a weight's eigenvalues.

    With λ the squared singular values in rising order, n of them and k = n // 2:
    α = 1 + k / Σ over i = 1..k of ln(λ_(n−i+1) / λ_(n−k)) (Lu et al., arXiv 2410.10912, equation 2).

    Args:
        weight: Shape (out, in).
    """
    wide = weight.detach().float()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    eigenvalues = torch.linalg.eigvalsh(gram.double()).clamp(min=1e-30)
    half = max(1, len(eigenvalues) // 2)
    tail = eigenvalues[-half:].log() - eigenvalues[max(len(eigenvalues) - half - 1, 0)].log()
    return 1.0 + half / max(float(tail.sum()), 1e-12)
