"""The column loop's inner part as one GPU kernel: a span of columns stays in registers while it is settled."""

import torch
import triton
import triton.language as tl

from evosweep.compressors.compensate import Rules

ROWS = 32  # a program; so that small layers, too, keep a GPU's processors busy
LEAST_SPAN = 16  # columns that a program has room for


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    part,
    errors,
    factor,
    codes,
    scale,
    zero,
    top,
    mask,
    rows,
    stride,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    MASKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    there = row < rows
    both = (column < COLUMNS)[:, None] & there[None, :]
    left = tl.load(part + column[:, None] * rows + row[None, :], mask=both, other=0.0)
    if ROUNDS:
        step = tl.load(scale + row, mask=there, other=1.0)
        middle = tl.load(zero + row, mask=there, other=0.0)
        most = tl.load(top + row, mask=there, other=1.0)
    for place in range(COLUMNS):
        weight = tl.sum(tl.where((column == place)[:, None], left, 0.0), axis=0)
        settled = weight
        if ROUNDS:
            # Half to even, as torch rounds: what is added and taken away again leaves no room for a fraction.
            code = weight * (1.0 / step) + middle
            code = tl.minimum(tl.maximum(code, 0.0), most)
            code = (code + 8388608.0) - 8388608.0
            tl.store(codes + place * rows + row, code.to(tl.uint8), mask=there)
            settled = (code - middle) * step
        if MASKS:
            kept = tl.load(mask + place * rows + row, mask=there, other=0)
            settled = tl.where(kept != 0, settled, 0.0)
        error = (weight - settled) / tl.load(factor + place * stride + place)
        tl.store(part + place * rows + row, settled, mask=there)
        tl.store(errors + place * rows + row, error, mask=there)
        after = tl.load(factor + place * stride + column, mask=(column > place) & (column < COLUMNS), other=0.0)
        left -= after[:, None] * error[None, :]


def settle(part: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, rules: Rules) -> None:
    """Settle a span, arguments as for ``compensate.settle``."""
    grid, mask, (columns, rows) = rules.grid, rules.mask, part.shape
    scale, zero, top = (part,) * 3 if grid is None else (grid.scale, grid.zero, grid.top)
    _settle[(triton.cdiv(rows, ROWS),)](
        part,
        errors,
        factor,
        part if rules.codes is None else rules.codes,
        scale,
        zero,
        top,
        part if mask is None else mask.view(torch.uint8),
        rows,
        factor.stride(0),
        COLUMNS=columns,
        SPAN=max(LEAST_SPAN, triton.next_power_of_2(columns)),
        ROWS=ROWS,
        ROUNDS=grid is not None,
        MASKS=mask is not None,
        num_warps=1,
    )
