"""Codes and grids of integer layers as one table that is learned: rows of all layers and levels side by side.

Everything is transposed, (columns, rows), as in the column loop. The layer's output error under the second moment H
is tr((W − Ŵ)·H·(W − Ŵ)ᵀ), a quadratic of every row by itself, so inputs are not needed to learn by.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

SMALLEST_SCALE = 2.0**-24  # of fp16


@dataclass
class Rounding:
    """Codes c, scales s and zeros z of some rows; they stand for the weights (c − z)·s.

    Attributes:
        codes: Whole numbers, fp32, shape (columns, rows).
        scale: Values of fp16, fp32, shape (groups, rows).
        zero: Whole numbers, fp32, shape (groups, rows).
        top: Largest code of each row, fp32, shape (rows,).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    top: torch.Tensor

    @property
    def group(self) -> int:
        """Columns that share scale and zero."""
        return len(self.codes) // len(self.scale)

    def values(self) -> torch.Tensor:
        """Return the weights that it stands for, fp32, shape (columns, rows)."""
        grouped = self.codes.unflatten(0, (-1, self.group))
        return ((grouped - self.zero[:, None]) * self.scale[:, None]).flatten(0, 1)

    def values_of(self, group: int) -> torch.Tensor:
        """Return the weights of one group, by index, shape (columns of the group, rows)."""
        columns = slice(group * self.group, (group + 1) * self.group)
        return (self.codes[columns] - self.zero[group]) * self.scale[group]

    def clone(self) -> "Rounding":
        """Return a copy."""
        return Rounding(self.codes.clone(), self.scale.clone(), self.zero.clone(), self.top)

    def take(self, other: "Rounding", rows: torch.Tensor) -> None:
        """Overwrite some rows, given as booleans (rows,), by another's."""
        self.codes = torch.where(rows, other.codes, self.codes)
        self.scale = torch.where(rows, other.scale, self.scale)
        self.zero = torch.where(rows, other.zero, self.zero)


@dataclass(frozen=True)
class Target:
    """What is learned: the weights, and the second moment that weighs their errors.

    Attributes:
        weight: Dense weights transposed, fp32, shape (columns, rows).
        gram: H, fp32, shape (columns, columns).
        damping: What is added to H's diagonal while learning; errors are reported without it.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    damping: float

    def damped(self) -> torch.Tensor:
        """Return H + damping·1, zero in the rows and columns of inputs that are always zero."""
        diagonal = self.gram.diagonal()
        return self.gram + torch.diag(torch.where(diagonal > 0, self.damping, 0.0))

    def errors(self, rounding: Rounding) -> torch.Tensor:
        """Return each row's output error, the diagonal of (W − Ŵ)·H·(W − Ŵ)ᵀ, shape (rows,)."""
        difference = self.weight - rounding.values()
        return (difference * (self.gram @ difference)).sum(dim=0).clamp_(min=0)


@dataclass(frozen=True)
class Learned:
    """What may change while learning.

    Attributes:
        rounding: The codes.
        scales: The groups' scales and, with ``zeros``, their zeros.
        zeros: Whether zeros may change with scales; a symmetric grid's are fixed.
        coarse: Whether scales are rounded to bfloat16, too.
    """

    rounding: bool = True
    scales: bool = True
    zeros: bool = True
    coarse: bool = False

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Return scales as they are stored: values of fp16, never zero."""
        stored = scale.half().float().clamp(min=SMALLEST_SCALE)
        return stored.bfloat16().float() if self.coarse else stored


def improve(
    start: Rounding, target: Target, method: Callable[[Rounding, Target], Rounding]
) -> tuple[Rounding, torch.Tensor]:
    """Return what a method learned where that is better, the start's rows elsewhere; and each row's output error.

    Args:
        start: Codes and grids to begin with; not changed.
        target: What they should come near to.
        method: Learns; may change what it is given.
    """
    before = target.errors(start)
    found = method(start.clone(), target)
    after = target.errors(found)
    worse = ~(after < before)  # also where it is no number
    found.take(start, worse)
    return found, torch.where(worse, before, after)
