"""Rounding of a span of columns to whole steps, each value drawn towards zero first, as one GPU kernel."""

import torch
import triton
import triton.language as tl

ROWS = 32  # of one program: few enough that small layers, too, keep all of a GPU's processors busy
LEAST_SPAN = 16  # columns that a program has room for


@triton.jit
def _finalize_steps(  # type: ignore[no-untyped-def]
    span,
    errors,
    factor,
    scale,
    by_row,
    by_column,
    rows,
    stride,
    reach,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    in_range = row < rows
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    work = tl.load(span + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    step = tl.load(scale + row, mask=in_range, other=1.0)
    drawn = tl.load(by_row + row, mask=in_range, other=0.0)
    for column_index in range(COLUMNS):
        weight = tl.sum(tl.where((column == column_index)[:, None], work, 0.0), axis=0)
        number = weight / (step * (1.0 + drawn * tl.load(by_column + column_index)))
        number = tl.minimum(tl.maximum(number, -reach), reach)
        number = (number + 12582912.0) - 12582912.0  # half to even: 1.5 · 2^23 leaves no room for a fraction
        final = number * step
        error = (weight - final) / tl.load(factor + column_index * stride + column_index)
        tl.store(span + column_index * rows + row, final, mask=in_range)
        tl.store(errors + column_index * rows + row, error, mask=in_range)
        after = tl.load(
            factor + column_index * stride + column, mask=(column > column_index) & (column < COLUMNS), other=0.0
        )
        work -= after[:, None] * error[None, :]


def finalize_steps(
    span: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    *,
    scale: torch.Tensor,
    by_row: torch.Tensor,
    by_column: torch.Tensor,
    reach: float,
) -> None:
    """Round a span of columns, in place, as ``entropy_steps.finalize_steps`` does.

    Args:
        span: Weights transposed, fp32, contiguous, shape (columns, rows); holds the final values at the end.
        errors: Filled with each column's change divided by its pivot; same shape.
        factor: The span's block of U's diagonal, shape (columns, columns).
        scale: Step of every row, shape (rows,).
        by_row: How far a row's values are drawn towards zero, shape (rows,).
        by_column: The same of columns, shape (columns,).
        reach: Largest number of steps.
    """
    columns, rows = span.shape
    _finalize_steps[(triton.cdiv(rows, ROWS),)](
        span,
        errors,
        factor,
        scale,
        by_row,
        by_column,
        rows,
        factor.stride(0),
        float(reach),
        COLUMNS=columns,
        SPAN=max(LEAST_SPAN, triton.next_power_of_2(columns)),
        ROWS=ROWS,
        num_warps=1,
    )
