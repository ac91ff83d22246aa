"""GPTQ (Frantar et al., arXiv 2210.17323) for several bit-widths and several layers at once.

Layers that share an input share its Hessian and one factorization; every (layer, width) is then just more rows
of one column loop, each row with its own largest code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evosweep.compressors.base import Payload, Plans
from evosweep.compressors.compensate import Rules, factorize, spans_of, sums, sweep, transposed
from evosweep.compressors.grid import Grid, largest, stacked
from evosweep.compressors.integer import IntegerLevels
from evosweep.core.checks import check_int, check_number


class GPTQ(IntegerLevels):
    """Error-compensating rounding against the second moment of the layer's inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row.
        symmetric: Whether the zero is the middle code.
        coarse_scales: Whether scales are values of bfloat16, too.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        group: int | None = 64,
        symmetric: bool = False,
        coarse_scales: bool = False,
        damping: float = 0.01,
        column_block: int = 64,
    ) -> None:
        super().__init__(bits=bits, group=group, symmetric=symmetric, coarse_scales=coarse_scales)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share the input of ``gram``.

        Raises:
            StoreError: ``gram`` stays singular whatever the damping.
        """
        del plans
        jobs = [(name, width) for name in weights for width in self.bits]
        rounded = quantize(
            [weights[name] for name, _ in jobs],
            gram,
            widths=[width for _, width in jobs],
            group=self.group_of(len(gram)),
            symmetric=self.symmetric,
            coarse=self.coarse_scales,
            damping=self.damping,
            column_block=self.column_block,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, width), (codes, scales, zeros, error) in zip(jobs, rounded, strict=True):
            result[name][f"{width}bit"] = self.payload(
                codes=codes, scales=scales, zeros=zeros, width=width, error=error
            )
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {**super().describe(), "damping": self.damping, "column_block": self.column_block}


Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""Codes uint8 (rows, columns), scales fp32 (rows, groups), zeros fp32 (rows, groups), error under ``gram``."""


def quantize(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    *,
    widths: Sequence[int],
    group: int,
    symmetric: bool,
    coarse: bool,
    damping: float,
    column_block: int,
) -> list[Rounded]:
    """Quantize matrices that share an input column by column, moving each column's error onto those that follow.

    Args:
        weights: Each (rows, columns) with the same columns; not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        widths: Bits a code, of each matrix.
        group: Columns a group; divides columns.
        symmetric: Whether the zero is the middle code.
        coarse: Whether scales are values of bfloat16, too.
        damping: Share of the mean diagonal added to the diagonal.
        column_block: Columns whose effect on later columns is applied at once.

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    sizes = [len(weight) for weight in weights]
    left = transposed(weights, gram)
    factor, top = factorize(gram, damping=damping), largest(widths, sizes, gram.device)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    grids: list[Grid] = []

    def rules(columns: slice) -> Rules:
        if columns.start % group == 0:
            members = left[columns.start : columns.start + group].T
            grids.append(Grid.of(members, top=top, symmetric=symmetric, coarse=coarse))
        return Rules(grids[-1], codes[columns])

    total = sweep(left, factor, spans=spans_of(len(left), edges=group, block=column_block), rules=rules)
    scales, zeros = stacked(grids)
    parts = (part.T for part in codes.split(sizes, 1))
    return list(zip(parts, scales.split(sizes), zeros.split(sizes), sums(total, sizes), strict=True))
