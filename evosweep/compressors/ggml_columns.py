"""The column loop over rows of blocks: scales stay as they are, codes are chosen column by column (GPTQ)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from evosweep.compressors.column_order import ColumnOrder
from evosweep.compressors.compensate import ColumnRules, Factor, spans_of, sums_by_matrix, sweep
from evosweep.compressors.formats.ggml_layout import Blocks, BlockType
from evosweep.compressors.ggml_fit import nearest_codes
from evosweep.compressors.grid import ColumnGrid, GridTable

Made = tuple[Blocks | None, float | None]
"""Blocks of a matrix, None where it is kept in 16 bits; and its output error, where that is known."""


class ColumnLoop:
    """The rows of several matrices that share an input, with the grids of their blocks.

    Args:
        work: Weights transposed, shape (columns, all rows); changed.
        grids: Blocks of each matrix.
        kinds: Their types; all with one table of values, or all without.
        order: In which columns are rounded.
    """

    def __init__(
        self, work: torch.Tensor, grids: Sequence[Blocks], kinds: Sequence[BlockType], *, order: ColumnOrder
    ) -> None:
        self.work = work[order.columns]
        self.grids = grids
        self.kinds = kinds
        self.order = order
        self.sizes = [grid.codes.numel() // len(work) for grid in grids]
        self.part = math.gcd(*(kind.part for kind in kinds))
        tables = [self._table(grid, kind) for grid, kind in zip(grids, kinds, strict=True)]
        self.scales = torch.cat([scales for scales, _ in tables], dim=1)
        self.zeros = torch.cat([zeros for _, zeros in tables], dim=1)
        top = torch.tensor([float(kind.top) for kind in kinds], device=work.device)
        self.top = top.repeat_interleave(torch.tensor(self.sizes, device=work.device))
        for column in (self.work == 0).all(dim=1).nonzero()[:, 0].tolist():
            # An input that is always zero: 0 may be on no grid, and what is moved onto others must be nothing.
            grid = self._grids_at(slice(column, column + 1)).at(0)
            self.work[column] = grid.values(grid.codes(self.work[column]))

    def _table(self, grid: Blocks, kind: BlockType) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero of every part of the narrowest width, shape (parts, rows)."""
        columns = len(self.work)
        rows = grid.codes.numel() // columns
        scale, added = (
            values.reshape(rows, -1).repeat_interleave(kind.part // self.part, dim=1).T.contiguous()
            for values in grid.grid(kind)
        )
        return scale, float(kind.zero or 0) - added / scale

    def _grids_at(self, span: slice) -> ColumnGrid:
        """Return the grids of some columns, given by their places in the order."""
        parts = self.order.columns[span] // self.part
        if self.kinds[0].values is not None:
            return ValueColumns(self.scales, self.kinds[0], parts)
        return GridTable(self.scales, self.zeros, self.top, parts)

    def run(self, factor: Factor, *, column_block: int) -> list[Made]:
        """Return each matrix's blocks with the codes that were chosen, and its output error.

        Args:
            factor: Of the input's second moment, columns in the loop's order.
            column_block: Columns whose effect on later columns is applied at once.
        """
        codes = torch.empty(self.work.shape, dtype=torch.uint8, device=self.work.device)

        def rules(span: slice) -> ColumnRules:
            return ColumnRules(self._grids_at(span), codes[span])

        spans = spans_of(len(codes), edges=len(codes), block=column_block)
        errors = sums_by_matrix(sweep(self.work, factor, spans=spans, rules=rules), self.sizes)
        chosen = self.order.back(codes).split(self.sizes, dim=1)
        return [
            (replace(grid, codes=own.T.reshape(-1, kind.block)), error)
            for grid, kind, own, error in zip(self.grids, self.kinds, chosen, errors, strict=True)
        ]


@dataclass(frozen=True)
class ValueColumns:
    """The grids of a span of columns whose codes stand for values of a table.

    Attributes:
        scales: Shape (parts, rows).
        kind: The type.
        parts: Part of each column, shape (columns,).
    """

    scales: torch.Tensor
    kind: BlockType
    parts: torch.Tensor

    def at(self, column: int) -> "ValueGrid":
        """Return the grid of a column, by its index in the span."""
        return ValueGrid(self.scales[self.parts[column]], self.kind)


@dataclass(frozen=True)
class ValueGrid:
    """The grid of one column of a ggml type with a table of values (IQ4_NL, MXFP4): a weight is table[code] · scale.

    Attributes:
        scale: Of every row, fp32, shape (rows,).
        kind: The type, which has the table.
    """

    scale: torch.Tensor
    kind: BlockType

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codes of the nearest values, fp32, shape (rows,)."""
        return nearest_codes(weight, self.scale, torch.zeros_like(self.scale), self.kind)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that codes stand for, fp32, shape (rows,)."""
        table = torch.tensor(self.kind.values, dtype=torch.float32, device=codes.device)
        return self.scale * table[codes.long()]
