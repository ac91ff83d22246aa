"""The order in which the column loop rounds columns, and grids that are made for groups before the loop begins.

By activation, the columns with the largest inputs come first, while all others can still compensate for them (GPTQ's
``--act-order``). With static groups the grid of a group is that of its weights as they were, so that a column keeps the
group that it stands in, and neither the format nor its size changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evosweep.compressors.grid import Grid, GridTable
from evosweep.compressors.grid_search import GridSearch, fit_grid, joined

ORDERS = ("given", "activation")


@dataclass(frozen=True)
class ColumnOrder:
    """A permutation of columns.

    Attributes:
        columns: Index of the column that comes first, second ..., shape (columns,).
    """

    columns: torch.Tensor

    @classmethod
    def by_activation(cls, gram: torch.Tensor) -> "ColumnOrder":
        """Return the order of falling second moments; of equals, the first column first."""
        return cls(gram.diagonal().argsort(descending=True, stable=True))

    def moment(self, gram: torch.Tensor) -> torch.Tensor:
        """Return a second moment (columns, columns) with its columns and rows in this order."""
        return gram[self.columns][:, self.columns]

    def back(self, ordered: torch.Tensor) -> torch.Tensor:
        """Return a table whose rows are columns of a weight in this order, in the weight's own order."""
        placed = torch.empty_like(ordered)
        placed[self.columns] = ordered
        return placed


@dataclass(frozen=True)
class StaticGrids:
    """The grid of every group of a weight's columns, made before any column is rounded.

    Attributes:
        scales: fp32, shape (groups, rows).
        zeros: fp32, same shape.
        top: Largest code of each row, shape (rows,).
        group: Columns a group.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    top: torch.Tensor
    group: int

    @classmethod
    def of(cls, work: torch.Tensor, fit: Callable[..., Grid], *, group: int, top: torch.Tensor) -> "StaticGrids":
        """Return the grids of weights as they are.

        Args:
            work: Weights transposed, shape (columns, rows).
            fit: Returns the grids of a group's weights (rows, group).
            group: Columns a group.
            top: Largest code of each row, shape (rows,).
        """
        made = [fit(work[start : start + group].T, top=top) for start in range(0, len(work), group)]
        scales = torch.stack([grid.scale for grid in made])
        return cls(scales, torch.stack([grid.zero for grid in made]), top, group)

    def at(self, columns: torch.Tensor) -> GridTable:
        """Return the grids of some columns, given by their indices in the weight."""
        return GridTable(self.scales, self.zeros, self.top, columns // self.group)


def fit_by_rows(
    weight: torch.Tensor,
    searches: Sequence[GridSearch | None],
    *,
    top: torch.Tensor,
    symmetric: bool,
    coarse: bool = False,
) -> Grid:
    """Return each row's grid, the first rows' by the first search, the next rows' by the next ...; all as many rows.

    Args:
        weight: Values of one group, shape (rows, group).
        searches: Of scales; None: minimum to maximum.
        top: Largest code of each row, shape (rows,).
        symmetric: Whether the zero is the middle code.
        coarse: Whether scales are rounded to bfloat16, too.
    """
    chunks = zip(weight.chunk(len(searches)), top.chunk(len(searches)), searches, strict=True)
    made = [fit_grid(rows, search, top=most, symmetric=symmetric, coarse=coarse) for rows, most, search in chunks]
    return made[0] if len(made) == 1 else joined(made)
