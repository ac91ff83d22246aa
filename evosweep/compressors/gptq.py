"""GPTQ (Frantar et al., arXiv 2210.17323) for several bit-widths and several layers at once.

Layers that share an input share its Hessian and one factorization; the rows of every (layer, width) go through one
column loop together, each row with its own largest code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.compensate import ColumnRules, factorize, spans_of, stack_transposed, sums_by_matrix, sweep
from evosweep.compressors.grid import Grid, largest_codes, stack_grids
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_int, check_number


class GPTQ(IntegerLevels):
    """Error-compensating rounding against the second moment of the layer's inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row.
        symmetric: Whether the zero is the middle code.
        coarse_scales: Whether scales are rounded to bfloat16, too.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    needs = frozenset({SECOND_MOMENT})

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
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The second moment stays singular whatever the damping.
        """
        gram = statistics.second_moment
        jobs = [(name, level) for name in weights for level in plans[name]]
        rounded = quantize(
            [weights[name] for name, _ in jobs],
            gram,
            widths=[level.spec.bits for _, level in jobs],
            group=self.group_of(len(gram)),
            symmetric=self.symmetric,
            coarse=self.coarse_scales,
            damping=self.damping,
            column_block=self.column_block,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), (codes, scales, zeros, error) in zip(jobs, rounded, strict=True):
            result[name][level.name] = self.payload(
                codes=codes, scales=scales, zeros=zeros, width=level.spec.bits, error=error
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
    """Return matrices that share an input quantized column by column, each column's error moved onto those after it.

    Args:
        weights: Each (rows, columns) with the same columns; not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        widths: Bits a code, of each matrix.
        group: Columns a group; divides columns.
        symmetric: Whether the zero is the middle code.
        coarse: Whether scales are rounded to bfloat16, too.
        damping: Share of the mean diagonal added to the diagonal.
        column_block: Columns whose effect on later columns is applied at once.

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    sizes = [len(weight) for weight in weights]
    work = stack_transposed(weights, gram)
    factor = factorize(gram, damping=damping)
    top = largest_codes(widths, sizes, gram.device)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    grids: list[Grid] = []

    def rules(columns: slice) -> ColumnRules:
        if columns.start % group == 0:
            members = work[columns.start : columns.start + group].T
            grids.append(Grid.of(members, top=top, symmetric=symmetric, coarse=coarse))
        return ColumnRules(grids[-1], codes[columns])

    total = sweep(work, factor, spans=spans_of(len(work), edges=group, block=column_block), rules=rules)
    scales, zeros = stack_grids(grids)
    codes_of = (matrix.T for matrix in codes.split(sizes, 1))
    return list(zip(codes_of, scales.split(sizes), zeros.split(sizes), sums_by_matrix(total, sizes), strict=True))
