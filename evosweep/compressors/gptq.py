"""GPTQ (Frantar et al., arXiv 2210.17323) for several bit-widths and several layers at once.

Layers that share an input share its Hessian and one factorization; every (layer, width) is then just more rows
of one column loop, each row with its own largest code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evosweep.compressors.base import Payload, Plans
from evosweep.compressors.compensate import (
    Replayed,
    Settle,
    inverse_factor,
    settle_columns,
    spans_of,
    sweep,
)
from evosweep.compressors.integer import IntegerLevels, grid
from evosweep.core.checks import check_int, check_number


class GPTQ(IntegerLevels):
    """Error-compensating rounding against the second moment of the layer's inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row.
        symmetric: Whether the zero is the middle code.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        group: int | None = 64,
        symmetric: bool = False,
        damping: float = 0.01,
        column_block: int = 32,
    ) -> None:
        super().__init__(bits=bits, group=group, symmetric=symmetric)
        self.damping = check_number("compressor.damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("compressor.column_block", column_block, low=1)
        self._settle = Replayed(round_span, changed=3)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share the input of ``gram``.

        Raises:
            StoreError: ``gram`` stays singular whatever the damping.
        """
        del plans
        jobs = [(name, width) for name in weights for width in self.bits]
        stacked = torch.cat([weights[name].float() for name, _ in jobs])
        top = torch.cat(
            [torch.full((len(weights[name]),), 2.0**width - 1, device=gram.device) for name, width in jobs]
        )
        codes, scales, zeros = quantize(
            stacked, gram, top=top, group=self.group_of(stacked.shape[1]), symmetric=self.symmetric,
            damping=self.damping, column_block=self.column_block, settle=self._settle,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        start = 0
        for name, width in jobs:
            rows = slice(start, start + len(weights[name]))
            start = rows.stop
            result[name][f"{width}bit"] = self.payload(
                codes=codes[rows], scales=scales[rows], zeros=zeros[rows], width=width
            )
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {**super().describe(), "damping": self.damping, "column_block": self.column_block}


def quantize(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    top: torch.Tensor,
    group: int,
    symmetric: bool,
    damping: float,
    column_block: int,
    settle: Settle | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows column by column, moving each column's error onto those that follow.

    Args:
        weight: fp32, shape (rows, columns); not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        top: Largest code of each row, shape (rows,).
        group: Columns a group; divides columns.
        symmetric: Whether the zero is the middle code.
        damping: Share of the mean diagonal added to the diagonal.
        column_block: Columns whose effect on later columns is applied at once.
        settle: Stands in for ``round_span``.

    Returns:
        codes uint8 (rows, columns), scales fp32 (rows, groups), zeros fp32 (rows, groups).

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    left = weight.T.contiguous().clone()
    left[gram.diagonal() == 0] = 0  # an input that is always zero: its weight may as well be zero
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    step = settle or round_span

    def settle_span(
        columns: slice, part: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor
    ) -> None:
        if columns.start % group == 0:
            scale, zero = grid(left[columns.start : columns.start + group].T, top=top, symmetric=symmetric)
            scales.append(scale)
            zeros.append(zero)
        step(part, errors, codes[columns], factor, scales[-1], scales[-1].reciprocal(), zeros[-1], top)

    spans = spans_of(len(left), edges=group, block=column_block)
    sweep(left, inverse_factor(gram, damping=damping), spans=spans, settle=settle_span)
    return codes.T.contiguous(), torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def round_span(
    part: torch.Tensor,
    errors: torch.Tensor,
    codes: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    inverse: torch.Tensor,
    zero: torch.Tensor,
    top: torch.Tensor,
) -> None:
    """Round the columns of a span to their group's grid, in place; scale, its inverse, zero and top are (rows,)."""
    bottom = torch.zeros_like(top)

    def choose(place: int, weights: torch.Tensor) -> torch.Tensor:
        # As to_codes and back, in place: a column is little work, and half of its time is starting operations.
        chosen = torch.addcmul(zero, weights, inverse).round_().clamp_(bottom, top)
        codes[place] = chosen
        return chosen.sub_(zero).mul_(scale)

    settle_columns(part, errors, factor, choose)
