"""Joint sparsity and quantization: SparseGPT's masks with GPTQ's rounding of what is kept, in one column loop.

Frantar and Alistarh (arXiv 2301.00774, section 3.5): pruning and rounding compensate errors in the same way, so a
column is masked and rounded in one step, and the columns after it compensate for both at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans, check_divides
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
from evosweep.compressors.formats import sparse_int
from evosweep.compressors.grid import Grid, largest_codes, stack_grids
from evosweep.compressors.grid_search import GridSettings
from evosweep.compressors.groups import check_fits, check_group, group_of
from evosweep.compressors.integer import check_widths
from evosweep.compressors.payload import Payload
from evosweep.compressors.sparse import SparseSpec, parse_pattern
from evosweep.compressors.sparsegpt import Masks
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal


@dataclass(frozen=True)
class SparseIntegerSpec:
    """A level that removes weights and rounds those that it keeps.

    Attributes:
        sparse: Which weights are kept.
        bits: Width of a kept weight's code.
    """

    sparse: SparseSpec
    bits: int


class SparseGPTQ:
    """Offers every sparsity at every width.

    Args:
        sparsity: Shares of weights removed, or N:M patterns; each above 0 and below 1.
        bits: Widths of the codes of what is kept, each from 2 to 8, rising.
        group: Columns that share scale and zero, a divisor of ``mask_block``; ``auto`` and lists as in ``GPTQ``.
        symmetric: Whether the zero is the middle code.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        mask_block: Columns whose mask is chosen at once; groups must fit into it.
        column_block: Columns between two updates of the columns that follow.
        order: Of the columns: ``given``; or by ``activation`` as in ``GPTQ`` as well, whichever has the lower error;
            not with N:M patterns, which need the given one.
        grid: ``minmax`` or ``mse``, as in ``GPTQ``; of the grids that are made, the one with the lower error is kept.
        grid_norm: As in ``GPTQ``.
        grid_least: As in ``GPTQ``.
        grid_steps: As in ``GPTQ``.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self,
        *,
        sparsity: Sequence[float | str] = (0.25, 0.5, 0.75),
        bits: Sequence[int] = (3, 4),
        group: int | str | Sequence[int] = 64,
        symmetric: bool = False,
        damping: float = 0.01,
        mask_block: int = 128,
        column_block: int = 64,
        order: str = "given",
        grid: str = "minmax",
        grid_norm: float = 2.4,
        grid_least: float = 0.5,
        grid_steps: int = 11,
    ) -> None:
        if not isinstance(sparsity, Sequence) or isinstance(sparsity, str) or not sparsity:
            raise SettingError("sparsity", allowed="a list of shares or N:M patterns", got=sparsity)
        self.sparsity = [_share(f"sparsity[{index}]", share) for index, share in enumerate(sparsity)]
        self.bits = check_widths(bits)
        self.group = check_group("group", group)
        if self.group is None:
            raise SettingError("group", allowed="a number of columns, a list of such, or auto", got=group)
        self.symmetric = check_bool("symmetric", symmetric)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.mask_block = check_int("mask_block", mask_block, low=1)
        self.column_block = check_int("column_block", column_block, low=1)
        self.order = check_choice("order", order, ORDERS)
        self.search = GridSettings(grid=grid, norm=grid_norm, least=grid_least, steps=grid_steps)
        if self.order == "activation" and any(isinstance(share, str) for share in self.sparsity):
            raise SettingError(
                "order",
                allowed=["given"],
                got=order,
                hint="N:M patterns in sparsity run along columns as they are given",
            )
        sizes = [self.group] if isinstance(self.group, int) else self.group
        if not isinstance(sizes, str) and any(self.mask_block % size for size in sizes):
            raise SettingError(
                "group",
                allowed=f"a divisor of compressor.mask_block={self.mask_block}",
                got=self.group,
                hint="a group's grid is made for the weights that its mask keeps",
            )

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a sparsity and width, named ``50%@4bit``, its nominal number the true bits a weight.

        Raises:
            SettingError: The group size, or M of a pattern, does not divide some layer's input width.
        """
        check_fits(self.group, shapes, owner=self, within=self.mask_block)
        for share in self.sparsity:
            if isinstance(share, str):
                check_divides("M of sparsity", parse_pattern("", share)[1], shapes, got=share, owner=self)
        return {name: self._levels(*shape) for name, shape in shapes.items()}

    def _group(self, columns: int) -> int:
        return group_of(self.group, columns, within=self.mask_block)

    def _levels(self, rows: int, columns: int) -> list[LevelSpec]:
        numel = rows * columns
        levels = []
        for share in self.sparsity:
            if isinstance(share, str):
                few, many = pattern = parse_pattern("", share)
                name = share
                sparse = SparseSpec(numel // many * few, pattern)
            else:
                name = f"{100 * share:.6g}%"
                sparse = SparseSpec(round(numel * (1 - share)))
            for width in self.bits:
                cost = sparse_int.bits(
                    rows=rows,
                    columns=columns,
                    kept=sparse.kept,
                    width=width,
                    group=self._group(columns),
                    symmetric=self.symmetric,
                )
                level = LevelSpec(
                    name=f"{name}@{width}bit",
                    cost=cost,
                    nominal=Nominal("bits_per_weight", cost / numel),
                    spec=SparseIntegerSpec(sparse, width),
                    removed=1 - sparse.kept / numel,
                )
                levels.append(level)
        return sorted(levels, key=lambda level: level.cost)

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
        jobs = [(name, level) for name in weights for level in plans[name]]
        made = self._best([weights[name] for name, _ in jobs], statistics.second_moment, [v.spec for _, v in jobs])
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), payload in zip(jobs, made, strict=True):
            result[name][level.name] = payload
        return result

    def _best(
        self, weights: Sequence[torch.Tensor], gram: torch.Tensor, specs: Sequence[SparseIntegerSpec]
    ) -> list[Payload]:
        """Return the payload of each matrix, made in every order with every grid, the one with the lowest error."""
        copies = len(self.search.searches)
        made: list[list[Payload]] = [[] for _ in specs]
        for order in self._orders(gram):
            factor = factorize(gram if order is None else order.moment(gram), damping=self.damping)
            for part in parts_of(weights, copies=copies):
                joint = self._joint([*weights[part]] * copies, gram, [*specs[part]] * copies, factor, order)
                for index, payload in enumerate(joint):
                    made[part.start + index % (part.stop - part.start)].append(payload)
        return [min(candidates, key=lambda one: one.error or 0.0) for candidates in made]

    def _orders(self, gram: torch.Tensor) -> list[ColumnOrder | None]:
        """Return the orders that are tried; None is the given one.

        By activation alone would be worse at high sparsities: each block of columns loses the same share of weights,
        those of the columns with the largest inputs, which then stand in one block, too.
        """
        return [None, ColumnOrder.by_activation(gram)] if self.order == "activation" else [None]

    def _joint(
        self,
        weights: Sequence[torch.Tensor],
        gram: torch.Tensor,
        specs: Sequence[SparseIntegerSpec],
        factor: Factor,
        order: ColumnOrder | None,
    ) -> list[Payload]:
        """Return the payload of each matrix.

        Args:
            weights: The matrices (rows, columns), all with one second moment.
            gram: That moment.
            specs: Of each matrix.
            factor: Of the moment, its columns in ``order``.
            order: Of the columns; None: as given.
        """
        sizes = [len(weight) for weight in weights]
        work = stack_transposed(weights, gram)
        top = largest_codes([spec.bits for spec in specs], sizes, gram.device)
        group = self._group(len(gram))
        fit = partial(fit_by_rows, searches=self.search.searches, symmetric=self.symmetric)
        static = None
        if order is not None:
            static = StaticGrids.of(work, fit, group=group, top=top)
            work = work[order.columns]
        masks = Masks(work, factor, sizes=sizes, specs=[spec.sparse for spec in specs], block=self.mask_block)
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        grids: list[Grid] = []

        def rules(columns: slice) -> ColumnRules:
            mask = masks.choose(columns)
            if static is not None and order is not None:
                return ColumnRules(static.at(order.columns[columns]), codes[columns], mask)
            if columns.start % group == 0:
                members = slice(columns.start, columns.start + group)
                kept = torch.where(masks.may_stay(members), work[members], 0.0)
                grids.append(fit(kept.T, top=top))
            return ColumnRules(grids[-1], codes[columns], mask)

        spans = spans_of(len(work), edges=math.gcd(masks.edges, group), block=self.column_block)
        total = sweep(work, factor, spans=spans, rules=rules)
        if static is not None and order is not None:
            scales = static.scales.T
            zeros = static.zeros.T
            codes = order.back(codes)
            mask = order.back(masks.mask)
        else:
            scales, zeros = stack_grids(grids)
            mask = masks.mask
        matrices = zip(
            specs,
            codes.T.split(sizes),
            mask.T.split(sizes),
            scales.split(sizes),
            zeros.split(sizes),
            sums_by_matrix(total, sizes),
            strict=True,
        )
        return [self._payload(*matrix) for matrix in matrices]

    def _payload(
        self,
        spec: SparseIntegerSpec,
        codes: torch.Tensor,
        mask: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        error: float,
    ) -> Payload:
        rows, columns = codes.shape
        tensors = sparse_int.encode(
            codes=codes,
            mask=mask,
            scales=scales,
            zeros=None if self.symmetric else zeros.to(torch.uint8),
            width=spec.bits,
        )
        meta = {
            "rows": rows,
            "columns": columns,
            "kept": spec.sparse.kept,
            "width": spec.bits,
            "group": columns // scales.shape[1],
        }
        return Payload(sparse_int.__name__, tensors, meta, error=error)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        own = {name: value for name, value in vars(self).items() if name != "search"}
        return {**own, **self.search.describe()}


def _share(setting: str, value: object) -> float | str:
    if isinstance(value, str):
        parse_pattern(setting, value)
        return value
    share = check_number(setting, value, low=0, high=1, exclusive=True)
    if share == 1:
        raise SettingError(setting, allowed="above 0 and below 1, or N:M", got=value)
    return share
