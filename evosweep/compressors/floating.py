"""GPTQ's rounding to small floating-point numbers: FP4, FP6, FP8, MXFP4, NVFP4.

The column loop is that of GPTQ (Frantar et al., arXiv 2210.17323), as ZeroQuant-FP uses it for floating-point weights
(Wu et al., arXiv 2307.09782); only the grid that a weight is rounded to is another one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans, check_divides
from evosweep.compressors.column_order import ORDERS, ColumnOrder
from evosweep.compressors.compensate import ColumnRules, factorize, spans_of, stack_transposed, sums_by_matrix, sweep
from evosweep.compressors.float_scales import FloatSpec, fit_scales, whole_scale
from evosweep.compressors.formats import float_blocks
from evosweep.compressors.formats.float_blocks import ELEMENTS, Limits
from evosweep.compressors.grid_search import GridSearch, GridSettings
from evosweep.compressors.groups import Group, check_fits, check_group, group_of
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

CONSTRAINTS = {"free": "fp16", "m1": "e8m0", "m2": "ratio"}


BLOCKS = {
    "mxfp4": FloatSpec("e2m1", 32, "e8m0", saturates=True),
    "mxfp6": FloatSpec("e2m3", 32, "e8m0", saturates=True),
    "mxfp8": FloatSpec("e4m3", 32, "e8m0", saturates=True),
    "nvfp4": FloatSpec("e2m1", 16, "nvfp4"),
    "fp8": FloatSpec("e4m3", None, "fp32"),
    "fp8_tensor": FloatSpec("e4m3", None, "layer"),
}
FORMATS = (*ELEMENTS, *BLOCKS)


class FloatingPoint:
    """Offers number formats as levels, each by error-compensating rounding.

    Args:
        formats: Of the levels. ``e2m1``, ``e3m0``, ``e2m3``, ``e3m2``, ``e4m3`` and ``e5m2`` have scales of groups, as
            the next two arguments say; ``mxfp4``, ``mxfp6``, ``mxfp8`` (blocks of 32, scales powers of two), ``nvfp4``
            (blocks of 16, E4M3 scales), ``fp8`` (E4M3, a scale an output row) and ``fp8_tensor`` (one scale) are what
            engines run. Within blocks the mantissa decides: 8-bit ``e4m3`` rounds no better there than 6-bit ``e2m3``.
        group: Columns that share a scale; null means a whole row, ``auto`` and lists as in ``GPTQ``.
        scales: ``free``, 16 bits each; or with ZeroQuant-FP's constraints, which make casting to FP8 cheap: ``m1``,
            powers of two, or ``m2``, the row's largest scale times powers of two (section 4 there).
        order: Of the columns: ``given``, or by ``activation`` with scales made before any column is rounded.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
        grid: ``minmax``: a block's scale is that of its largest value; ``mse``: the scale at which Σ|w − ŵ|^norm is
            least. With ``mse`` a layer is made both ways, and the one with the lower output error is kept.
        grid_norm: Exponent of that error, at least 1.
        grid_least: Smallest part that is tried of the widest range, 1.5 times the block's.
        grid_steps: How many parts are tried, where scales are not powers of two apart.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self,
        *,
        formats: Sequence[str] = ("e2m1", "e2m3", "fp8"),
        group: Group = 64,
        scales: str = "free",
        order: str = "given",
        damping: float = 0.01,
        column_block: int = 64,
        grid: str = "minmax",
        grid_norm: float = 2.4,
        grid_least: float = 0.5,
        grid_steps: int = 11,
    ) -> None:
        if not isinstance(formats, Sequence) or isinstance(formats, str) or not formats:
            raise SettingError("formats", allowed=f"a list of {', '.join(FORMATS)}", got=formats)
        self.formats = [check_choice("formats", name, FORMATS) for name in formats]
        if len(set(self.formats)) < len(self.formats):
            raise SettingError("formats", allowed="each format once", got=list(formats))
        self.group = check_group("group", group)
        self.scales = check_choice("scales", scales, tuple(CONSTRAINTS))
        if self.scales == "m2" and self.group is None and any(name in ELEMENTS for name in self.formats):
            raise SettingError(
                "scales", allowed=["free", "m1"], got=scales, hint="a whole row has one scale: set compressor.group"
            )
        self.order = check_choice("order", order, ORDERS)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)
        self.search = GridSettings(grid=grid, norm=grid_norm, least=grid_least, steps=grid_steps)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a format, named after it and its scales' constraint; nominal are the bits of a number.

        Raises:
            SettingError: A block does not divide some layer's input width, or two formats take the same bits.
        """
        for name in self.formats:
            if name in BLOCKS:
                block = BLOCKS[name].block
                allowed = f"formats whose blocks ({block} columns in {name}) divide every input width"
                check_divides("formats", block or 1, shapes, allowed=allowed, got=name, owner=self)
            else:
                check_fits(self.group, shapes, owner=self)
        return {name: self._levels(*shape) for name, shape in shapes.items()}

    def _spec(self, name: str, columns: int) -> FloatSpec:
        size = None if self.group is None else group_of(self.group, columns)
        return BLOCKS.get(name) or FloatSpec(name, size, CONSTRAINTS[self.scales])

    def _levels(self, rows: int, columns: int) -> list[LevelSpec]:
        levels = []
        for name in self.formats:
            spec = self._spec(name, columns)
            cost = float_blocks.bits(
                rows=rows, columns=columns, element=spec.element, block=spec.block or columns, scale=spec.scale
            )
            label = f"{name}_{self.scales}" if name in ELEMENTS and self.scales != "free" else name
            levels.append(LevelSpec(label, cost, Nominal("bits", float(ELEMENTS[spec.element].bits)), spec))
        levels.sort(key=lambda level: level.cost)
        for one, other in pairwise(levels):
            if one.cost == other.cost:
                raise SettingError(
                    "formats",
                    owner=self,
                    allowed="formats of different sizes",
                    got=[one.name, other.name],
                    hint="compressor=several keeps the better of two for each layer",
                )
        return levels

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
        made = [
            self._rounded([weights[name] for name, _ in jobs], [level.spec for _, level in jobs], search, statistics)
            for search in self.search.searches
        ]
        best = [min(ways, key=lambda payload: payload.error or 0.0) for ways in zip(*made, strict=True)]
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), payload in zip(jobs, best, strict=True):
            result[name][level.name] = payload
        return result

    def _rounded(
        self,
        weights: Sequence[torch.Tensor],
        specs: Sequence[FloatSpec],
        search: GridSearch | None,
        statistics: Statistics,
    ) -> list[Payload]:
        """Return the payload of each matrix (rows, columns)."""
        gram = statistics.second_moment
        sizes = [len(weight) for weight in weights]
        work = stack_transposed(weights, gram)
        stripes = [Stripe(rows, spec, search) for rows, spec in zip(work.split(sizes, dim=1), specs, strict=True)]
        limits = Limits.of([spec.element for spec in specs], sizes, work.device)
        if self.order == "activation":
            order = ColumnOrder.by_activation(gram)
            for stripe in stripes:
                stripe.measure_all()
            work = work[order.columns]
            gram = order.moment(gram)
            edges = len(work)
        else:
            order = ColumnOrder(torch.arange(len(work), device=work.device))
            edges = math.gcd(*(stripe.block for stripe in stripes))
        numbers = torch.empty_like(work)

        def rules(columns: slice) -> ColumnRules:
            if self.order == "given":
                for stripe in stripes:
                    if columns.start % stripe.block == 0:
                        stripe.measure(columns.start // stripe.block)
            scales = torch.cat([stripe.scales_at(order.columns[columns]) for stripe in stripes], dim=1)
            return ColumnRules(FloatColumns(scales, limits), numbers[columns])

        spans = spans_of(len(work), edges=edges, block=self.column_block)
        total = sweep(work, factorize(gram, damping=self.damping), spans=spans, rules=rules)
        found = zip(stripes, order.back(numbers).split(sizes, dim=1), sums_by_matrix(total, sizes), strict=True)
        return [stripe.payload(mine, error) for stripe, mine, error in found]

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {**vars(self), "search": self.search.describe()}


class Stripe:
    """The rows of one matrix at one level, within the rows of all, and their scales.

    Args:
        weight: The matrix, transposed, shape (columns, rows). With columns in their own order it is what the column
            loop works on, so that a block's scales are those of its weights when the loop reaches it.
        spec: The level.
        search: Of the scales; None: those of the blocks' largest values.
    """

    def __init__(self, weight: torch.Tensor, spec: FloatSpec, search: GridSearch | None) -> None:
        columns, rows = weight.shape
        self.weight = weight
        self.spec = spec
        self.search = search
        self.block = spec.block or columns
        self.whole = whole_scale(weight, spec)
        self.scales = torch.empty(columns // self.block, rows, device=weight.device)

    def measure_all(self) -> None:
        """Make the scales of all blocks from weights as they are."""
        blocks = self.weight.unflatten(0, (-1, self.block))
        self.scales = fit_scales(blocks, self.spec, self.search, whole=self.whole)

    def measure(self, block: int) -> None:
        """Make the scales of one block, by its index, from weights as they are."""
        members = self.weight[None, block * self.block : (block + 1) * self.block]
        self.scales[block] = fit_scales(members, self.spec, self.search, whole=self.whole)[0]

    def scales_at(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the scales of some columns, given by their indices in the weight, shape (columns, rows)."""
        return self.scales[columns // self.block]

    def payload(self, numbers: torch.Tensor, error: float) -> Payload:
        """Return the payload of the matrix.

        Args:
            numbers: Of the element format, shape (columns, rows).
            error: Output error.
        """
        element = self.spec.element
        kind = self.spec.scale
        stored = float_blocks.encode_scales(self.scales.T.contiguous(), kind, whole=self.whole)
        columns, rows = numbers.shape
        return Payload(
            float_blocks.__name__,
            float_blocks.encode(values=numbers.T, scales=stored, element=element),
            {"rows": rows, "columns": columns, "element": element, "block": self.block, "scale": kind},
            error=error,
        )


@dataclass(frozen=True)
class FloatColumns:
    """The grids of a span of columns.

    Attributes:
        scales: Of each column, shape (columns, rows).
        limits: Of each row's format.
    """

    scales: torch.Tensor
    limits: Limits

    def at(self, column: int) -> "FloatGrid":
        """Return the grid of a column, by its index in the span."""
        return FloatGrid(self.scales[column], self.limits)


@dataclass(frozen=True)
class FloatGrid:
    """The grid of one column: each row has a floating-point format and a scale.

    Codes are the format's numbers themselves, fp32, so that a weight is code · scale.

    Attributes:
        scale: Of every row, fp32, shape (rows,).
        limits: Range and precision of every row's format.
    """

    scale: torch.Tensor
    limits: Limits

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest number of each row's format, fp32, shape (rows,)."""
        return float_blocks.rounded(weight / self.scale, self.limits)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that numbers stand for, fp32, shape (rows,)."""
        return codes * self.scale
