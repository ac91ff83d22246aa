"""The nearest of many points in one or two dimensions, by a table of cells with the few points that may be it."""

import functools
from dataclasses import dataclass

import torch

from evosweep.compressors.formats.vector_grid import grid_points

REACH = 6.0  # cells cover −REACH .. REACH in every dimension; beyond, the outermost cell's candidates serve
CELLS = {1: 4096, 2: 192}  # a dimension
AT_ONCE = 2**22  # distances in memory at once


@dataclass(frozen=True)
class CellTable:
    """Candidates by cell of several grids of one dimension, one grid after the other.

    Attributes:
        points: All grids' points and one that is far away, fp32, shape (points, dimension).
        candidates: Their indices, filled up with the far one, int32, shape (grids · cells, most candidates).
        first: Index of each grid's first point, int64, shape (grids,).
        side: Cells a dimension.
    """

    points: torch.Tensor
    candidates: torch.Tensor
    first: torch.Tensor
    side: int

    def near(self, values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Return the points that may be nearest to values: indices, int64, shape (rows, candidates).

        Args:
            values: Shape (rows, dimension), in the grids' units.
            grid: Index of each row's grid, shape (rows,).
        """
        cell = ((values + REACH) * (self.side / (2 * REACH))).long().clamp_(0, self.side - 1)
        index = grid
        for axis in cell.T:
            index = index * self.side + axis
        return self.candidates[index].long()


@functools.lru_cache(maxsize=8)
def cell_table(dimension: int, sizes: tuple[int, ...], device: torch.device) -> CellTable:
    """Return the table of the normal distribution's grids of some sizes.

    A point is a candidate of a cell if it is no farther from its centre than the nearest point and the cell's diagonal
    together: no value inside the cell can be nearest to any other.

    Args:
        dimension: Weights a point.
        sizes: Points of each grid.
        device: Where the table is needed.
    """
    side = CELLS[dimension]
    centre = (torch.arange(side, device=device) + 0.5) * (2 * REACH / side) - REACH
    cells = torch.cartesian_prod(*[centre] * dimension).view(-1, dimension)
    diagonal = 2 * REACH / side * dimension**0.5
    grids = [grid_points(dimension, size, device) for size in sizes]
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    far = sum(sizes)
    tables = []
    for grid, offset in zip(grids, offsets, strict=True):
        parts = []
        for some in cells.split(max(1, AT_ONCE // len(grid))):
            distance = torch.cdist(some, grid, compute_mode="donot_use_mm_for_euclid_dist")
            within = distance <= distance.amin(dim=1, keepdim=True) + diagonal
            most = int(within.sum(dim=1).amax())
            index = distance.topk(most, dim=1, largest=False).indices
            parts.append(torch.where(within.gather(1, index), index + offset, far).int())
        widest = max(part.shape[1] for part in parts)
        tables += [torch.nn.functional.pad(part, (0, widest - part.shape[1]), value=far) for part in parts]
    widest = max(table.shape[1] for table in tables)
    candidates = torch.cat([torch.nn.functional.pad(t, (0, widest - t.shape[1]), value=far) for t in tables])
    points = torch.cat([*grids, torch.full((1, dimension), 1e6, device=device)])
    return CellTable(points, candidates, torch.tensor(offsets, device=device), side)
