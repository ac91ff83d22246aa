"""The inner part of the column loop as one GPU kernel: a span of columns stays in registers until it is final."""

import torch
import triton
import triton.language as tl

from evosweep.compressors.grid import Grid, GridTable

ROWS = 32  # of one program: few enough that small layers, too, keep all of a GPU's processors busy
LEAST_SPAN = 16  # columns that a program has room for


@triton.jit
def _finalize_columns(  # type: ignore[no-untyped-def]
    span,
    errors,
    factor,
    codes,
    scale,
    zero,
    top,
    groups,
    mask,
    rows,
    stride,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    GROUPED: tl.constexpr,
    MASKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    in_range = row < rows
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    work = tl.load(span + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    if ROUNDS:
        step = tl.load(scale + row, mask=in_range, other=1.0)
        middle = tl.load(zero + row, mask=in_range, other=0.0)
        most = tl.load(top + row, mask=in_range, other=1.0)
    for column_index in range(COLUMNS):
        weight = tl.sum(tl.where((column == column_index)[:, None], work, 0.0), axis=0)
        final = weight
        if GROUPED:
            cell = tl.load(groups + column_index) * rows + row
            step = tl.load(scale + cell, mask=in_range, other=1.0)
            middle = tl.load(zero + cell, mask=in_range, other=0.0)
        if ROUNDS:
            # Half to even, as torch rounds: what is added and taken away again leaves no room for a fraction.
            code = weight * (1.0 / step) + middle
            code = tl.minimum(tl.maximum(code, 0.0), most)
            code = (code + 8388608.0) - 8388608.0
            tl.store(codes + column_index * rows + row, code.to(tl.uint8), mask=in_range)
            final = (code - middle) * step
        if MASKS:
            kept = tl.load(mask + column_index * rows + row, mask=in_range, other=0)
            final = tl.where(kept != 0, final, 0.0)
        error = (weight - final) / tl.load(factor + column_index * stride + column_index)
        tl.store(span + column_index * rows + row, final, mask=in_range)
        tl.store(errors + column_index * rows + row, error, mask=in_range)
        after = tl.load(
            factor + column_index * stride + column, mask=(column > column_index) & (column < COLUMNS), other=0.0
        )
        work -= after[:, None] * error[None, :]


def finalize_columns(
    span: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    *,
    grid: Grid | GridTable | None = None,
    codes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    """Round and prune a span of columns, in cell, as ``compensate.finalize_columns`` does.

    Args:
        span: Weights transposed, fp32, contiguous, shape (columns, rows); holds the final values at the end.
        errors: Filled with each column's change divided by its pivot; same shape.
        factor: The span's block of U's diagonal, shape (columns, columns).
        grid: Grid of every row, or of every row and column; None: no rounding.
        codes: Filled with the codes, uint8, same shape as ``span``; needed with a grid.
        mask: True where a weight is kept, same shape; None: no pruning.
    """
    columns, rows = span.shape
    scale, zero, top, groups = _tables(span, grid)
    _finalize_columns[(triton.cdiv(rows, ROWS),)](
        span,
        errors,
        factor,
        span if codes is None else codes,
        scale,
        zero,
        top,
        groups,
        span if mask is None else mask.view(torch.uint8),
        rows,
        factor.stride(0),
        COLUMNS=columns,
        SPAN=max(LEAST_SPAN, triton.next_power_of_2(columns)),
        ROWS=ROWS,
        ROUNDS=grid is not None,
        GROUPED=isinstance(grid, GridTable),
        MASKS=mask is not None,
        num_warps=1,
    )


def _tables(span: torch.Tensor, grid: Grid | GridTable | None) -> tuple[torch.Tensor, ...]:
    """Return scales, zeros, largest codes and the columns' groups; anything where the kernel does not read them."""
    if grid is None:
        return span, span, span, span
    if isinstance(grid, GridTable):
        return grid.scales, grid.zeros, grid.top, grid.groups
    return grid.scale, grid.zero, grid.top, span
