"""The grid that a group of weights is rounded to: codes from 0 to a largest code, a scale and a zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


class RowGrid(Protocol):
    """The values that the weights of one column, one weight a row, may be rounded to."""

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the code of the value nearest to each weight; both of shape (rows,)."""

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the fp32 weights that codes stand for; both of shape (rows,)."""


class ColumnGrid(Protocol):
    """The grids of a span of columns, for the error-compensating column loop."""

    def at(self, column: int) -> RowGrid:
        """Return the grid of a column, by its index in the span."""


@dataclass(frozen=True)
class Grid:
    """Codes 0 .. top stand for (code − zero)·scale.

    Attributes:
        scale: fp32 holding fp16 values, shape (rows,).
        zero: Whole numbers, fp32, shape (rows,).
        top: Largest code of each row, 2^width − 1, fp32, shape (rows,).
    """

    scale: torch.Tensor
    zero: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, *, top: torch.Tensor, symmetric: bool, coarse: bool = False) -> "Grid":
        """Return the min-max grid of each row; zero is always on it.

        The scale is rounded to fp16 here, before any code is chosen, so that what is stored is what was optimized.

        Args:
            weight: Values of one group, shape (rows, group).
            top: Largest code of each row, shape (rows,).
            symmetric: Whether the zero is the middle code (top + 1) / 2.
            coarse: Whether scales are rounded to bfloat16, too, for formats that keep scales in the model's type.
        """
        low = weight.amin(dim=1).clamp(max=0)
        high = weight.amax(dim=1).clamp(min=0)
        if symmetric:
            reach = torch.maximum(-low, high)
            low = -reach
            high = reach
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale = ((high - low) / top).half().float().clamp(min=2.0**-24)
        scale = (
            scale.bfloat16().float() if coarse else scale
        )  # which may only lose digits: the value is one of fp16's, too
        zero = (top + 1) / 2 if symmetric else torch.round(-low / scale).clamp(min=0).minimum(top)
        return cls(scale, zero, top)

    def at(self, column: int) -> "Grid":
        """Return the grid of a column of the group: the same for all."""
        del column
        return self

    @cached_property
    def inverse(self) -> torch.Tensor:
        """1 / scale."""
        return self.scale.reciprocal()

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes of weights (rows,) or (rows, columns), fp32, same shape."""
        inverse, zero, top = (_by_row(values, weight) for values in (self.inverse, self.zero, self.top))
        return torch.addcmul(zero, weight, inverse).round_().clamp_(min=0).minimum(top)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that codes (rows,) or (rows, columns) decode to, fp32, same shape."""
        return (codes - _by_row(self.zero, codes)).mul_(_by_row(self.scale, codes))


@dataclass(frozen=True)
class GridTable:
    """The grids of a span of columns, each column's that of its group.

    Attributes:
        scales: fp32 holding fp16 values, shape (groups, rows).
        zeros: Whole numbers, fp32, same shape.
        top: Largest code of each row, fp32, shape (rows,).
        groups: Group of each column of the span, shape (columns,).
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    top: torch.Tensor
    groups: torch.Tensor

    @cached_property
    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scales[self.groups], self.zeros[self.groups]

    def at(self, column: int) -> Grid:
        """Return the grid of a column, by its index in the span."""
        scales, zeros = self._rows
        return Grid(scales[column], zeros[column], self.top)


def _by_row(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return one value a row, shaped to be combined with a table (rows,) or (rows, columns)."""
    return values if table.dim() == 1 else values[:, None]


def stack_grids(grids: Sequence[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros of consecutive groups, both (rows, groups)."""
    return torch.stack([grid.scale for grid in grids], dim=1), torch.stack([grid.zero for grid in grids], dim=1)


def largest_codes(widths: Sequence[int], sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the largest code of every row, 2^width − 1 (fp32), for the rows of several matrices put together.

    Args:
        widths: Bits a code, of each matrix.
        sizes: Rows of each matrix.
        device: Where the result is needed.
    """
    tops = torch.tensor([2.0**width - 1 for width in widths], device=device)
    return tops.repeat_interleave(torch.tensor(sizes, device=device))
