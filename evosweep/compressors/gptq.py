"""GPTQ (Frantar et al., arXiv 2210.17323) for several bit-widths and several layers at once.

Layers that share an input share its Hessian and one factorization; the rows of every (layer, width) go through one
column loop together, each row with its own largest code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.column_order import ORDERS, ColumnOrder, StaticGrids, fit_by_rows
from evosweep.compressors.compensate import (
    ColumnRules,
    Factor,
    factorize,
    parts_of,
    spans_of,
    stack_transposed,
    sums_by_matrix,
    sweep,
)
from evosweep.compressors.grid import Grid, largest_codes, stack_grids
from evosweep.compressors.grid_search import GridSearch, GridSettings
from evosweep.compressors.groups import Group
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_choice, check_int, check_number


class GPTQ(IntegerLevels):
    """Error-compensating rounding against the second moment of the layer's inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row, ``auto`` the largest of 128, 64 and 32 that
            divides a layer's input width (else its largest divisor below), a list its first that does.
        symmetric: Whether the zero is the middle code.
        coarse_scales: Whether scales are rounded to bfloat16, too.
        group_bits: Bits that a group is counted with beside its codes; null: 16 for its scale, and a width for its
            zero if asymmetric. Formats that keep more count more: 32 for ``export=mlx``.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
        order: Of the columns: ``given``, or by ``activation``, those with the largest inputs first (GPTQ's
            ``--act-order``), each with the grid that its group has before any column is rounded.
        grid: ``minmax``, a group's range; or ``mse``, the part of the range at which Σ|w − ŵ|^norm is least.
        grid_norm: Exponent of that error, at least 1.
        grid_least: Smallest part of the range that is tried.
        grid_steps: How many parts are tried, from the whole range to the smallest.

    With ``grid=mse`` a layer is made with its range's grid as well, and of each level the one with the lower output
    error is kept.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        group: Group = 64,
        symmetric: bool = False,
        coarse_scales: bool = False,
        group_bits: int | None = None,
        damping: float = 0.01,
        column_block: int = 64,
        order: str = "given",
        grid: str = "minmax",
        grid_norm: float = 2.4,
        grid_least: float = 0.5,
        grid_steps: int = 11,
    ) -> None:
        search = GridSettings(grid=grid, norm=grid_norm, least=grid_least, steps=grid_steps)
        super().__init__(
            bits=bits,
            group=group,
            symmetric=symmetric,
            coarse_scales=coarse_scales,
            group_bits=group_bits,
            search=search,
        )
        self.order = check_choice("order", order, ORDERS)
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
            order=self.order,
            searches=self.search.searches,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), (codes, scales, zeros, error) in zip(jobs, rounded, strict=True):
            result[name][level.name] = self.payload(
                codes=codes, scales=scales, zeros=zeros, width=level.spec.bits, error=error
            )
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        own = {"damping": self.damping, "column_block": self.column_block, "order": self.order}
        return {**super().describe(), **own}


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
    order: str = "given",
    searches: Sequence[GridSearch | None] = (None,),
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
        order: ``given`` or ``activation``.
        searches: Ways to find a grid, None for minimum to maximum; each matrix is made with all of them, and the one
            with the lowest error is kept.

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    by = ColumnOrder.by_activation(gram) if order == "activation" else None
    loop = _Loop(
        factorize(gram if by is None else by.moment(gram), damping=damping),
        order=by,
        group=group,
        fit=partial(fit_by_rows, searches=searches, symmetric=symmetric, coarse=coarse),
        column_block=column_block,
    )
    rounded: list[Rounded] = []
    for part in parts_of(weights, copies=len(searches)):
        many = [*weights[part]] * len(searches)
        sizes = [len(weight) for weight in many]
        top = largest_codes([*widths[part]] * len(searches), sizes, gram.device)
        codes, scales, zeros, total = loop.run(stack_transposed(many, gram), top)
        codes_of = (matrix.T for matrix in codes.split(sizes, 1))
        made = list(zip(codes_of, scales.split(sizes), zeros.split(sizes), sums_by_matrix(total, sizes), strict=True))
        count = len(many) // len(searches)
        rounded += [min(made[index::count], key=lambda one: one[3]) for index in range(count)]
    return rounded


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes (columns, rows), scales and zeros (rows, groups), and the error of each row (rows,)."""


@dataclass(frozen=True)
class _Loop:
    """The column loop over the rows of several matrices.

    Attributes:
        factor: Of their second moment, its columns in ``order``.
        order: Of the columns; None: as given.
        group: Columns a group.
        fit: Returns the grids of a group's weights (rows, group).
        column_block: Columns whose effect on later columns is applied at once.
    """

    factor: Factor
    order: ColumnOrder | None
    group: int
    fit: Callable[..., Grid]
    column_block: int

    def run(self, work: torch.Tensor, top: torch.Tensor) -> Parts:
        """Return the outcome for weights transposed, shape (columns, rows), and the largest code of each row."""
        return self._as_given(work, top) if self.order is None else self._ordered(work, top, self.order)

    def _as_given(self, work: torch.Tensor, top: torch.Tensor) -> Parts:
        """Return the outcome with columns in their own order, a group's grid made when the loop reaches it."""
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        grids: list[Grid] = []

        def rules(columns: slice) -> ColumnRules:
            if columns.start % self.group == 0:
                grids.append(self.fit(work[columns.start : columns.start + self.group].T, top=top))
            return ColumnRules(grids[-1], codes[columns])

        spans = spans_of(len(work), edges=self.group, block=self.column_block)
        total = sweep(work, self.factor, spans=spans, rules=rules)
        return codes, *stack_grids(grids), total

    def _ordered(self, work: torch.Tensor, top: torch.Tensor, order: ColumnOrder) -> Parts:
        """Return the outcome with columns in another order, and every group's grid made before."""
        grids = StaticGrids.of(work, self.fit, group=self.group, top=top)
        work = work[order.columns]
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)

        def rules(columns: slice) -> ColumnRules:
            return ColumnRules(grids.at(order.columns[columns]), codes[columns])

        spans = spans_of(len(work), edges=len(work), block=self.column_block)
        total = sweep(work, self.factor, spans=spans, rules=rules)
        return order.back(codes), grids.scales.T, grids.zeros.T, total
