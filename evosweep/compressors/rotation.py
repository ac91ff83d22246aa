"""Rotations of a layer's inputs or outputs that follow from a seed and a width: random signs, then Hadamard blocks."""

import functools
from dataclasses import dataclass

import torch
from scipy.linalg import hadamard

from evosweep.core.seeds import generator

SMALLEST_BLOCK = 16  # fewer summands leave a weight's distribution far from normal


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R: signs on the diagonal, times one block along the diagonal.

    Attributes:
        signs: −1 or 1, fp32, shape (width,).
        block: Orthogonal, fp32, shape (size, size); size divides width.
    """

    signs: torch.Tensor
    block: torch.Tensor

    @classmethod
    def of(cls, width: int, *, seed: int, device: torch.device) -> "Rotation":
        """Return the rotation of a width.

        Its blocks are Hadamard matrices of the largest power of two that divides the width (QuIP#, arXiv
        2402.04396). Where that is below SMALLEST_BLOCK, one random orthogonal matrix rotates the whole width.

        Args:
            width: Number of inputs or outputs.
            seed: Decides signs, and the random matrix.
            device: Where the result is needed.
        """
        return _rotation(width, seed, device)

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Return values·R, fp32, same shape (..., width)."""
        return self._by_block(values * self.signs, self.block)

    def undo(self, values: torch.Tensor) -> torch.Tensor:
        """Return values·Rᵀ, fp32, same shape (..., width)."""
        return self._by_block(values, self.block.T) * self.signs

    def conjugate(self, moment: torch.Tensor) -> torch.Tensor:
        """Return Rᵀ·H·R, the second moment of rotated inputs."""
        return self.apply(self.apply(moment).T.contiguous()).T.contiguous()

    @staticmethod
    def _by_block(values: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        return (values.reshape(-1, len(block)) @ block).view(values.shape)


@functools.lru_cache(maxsize=16)
def _rotation(width: int, seed: int, device: torch.device) -> Rotation:
    draws = generator(seed, "rotation", width)
    signs = torch.from_numpy(draws.integers(0, 2, width) * 2.0 - 1).float()
    size = width & -width
    if size >= SMALLEST_BLOCK:
        block = torch.from_numpy(hadamard(size) / size**0.5).float()
    else:
        block = torch.linalg.qr(torch.from_numpy(draws.standard_normal((width, width))))[0].float()
    return Rotation(signs.to(device), block.to(device))
