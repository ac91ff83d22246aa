"""GPTQ's rounding to small floating-point numbers: FP4, FP6, FP8, MXFP4, NVFP4.

The column loop is that of GPTQ (Frantar et al., arXiv 2210.17323), as ZeroQuant-FP uses it for floating-point weights
(Wu et al., arXiv 2307.09782); only the grid that a weight is rounded to is another one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans, check_divides
from evosweep.compressors.column_order import ORDERS, ColumnOrder
from evosweep.compressors.compensate import ColumnRules, factorize, spans_of, stack_transposed, sums_by_matrix, sweep
from evosweep.compressors.formats import float_blocks
from evosweep.compressors.formats.float_blocks import ELEMENTS, MOST_RATIO
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

LEAST = 2.0**-24  # smallest scale: that of fp16
LEAST_E4M3 = 2.0**-9
CONSTRAINTS = {"free": "fp16", "m1": "e8m0", "m2": "ratio"}


@dataclass(frozen=True)
class FloatSpec:
    """A level of floating-point numbers.

    Attributes:
        element: Name of the numbers' format.
        block: Columns that share a scale; None: a whole row.
        scale: Kind of the scales, as in ``formats.float_blocks``.
        saturates: Whether a power-of-two scale is rounded down, so that a block's largest values may be cut off, as
            the OCP specification has it; else up.
    """

    element: str
    block: int | None
    scale: str
    saturates: bool = False


BLOCKS = {
    "mxfp4": FloatSpec("e2m1", 32, "e8m0", saturates=True),
    "mxfp6": FloatSpec("e2m3", 32, "e8m0", saturates=True),
    "mxfp8": FloatSpec("e4m3", 32, "e8m0", saturates=True),
    "nvfp4": FloatSpec("e2m1", 16, "nvfp4"),
    "fp8": FloatSpec("e4m3", None, "fp32"),
}
FORMATS = (*ELEMENTS, *BLOCKS)


class FloatingPoint:
    """Offers number formats as levels, each by error-compensating rounding.

    Args:
        formats: Of the levels. ``e2m1``, ``e3m0``, ``e2m3``, ``e3m2``, ``e4m3`` and ``e5m2`` have scales of groups, as
            the next two arguments say; ``mxfp4``, ``mxfp6``, ``mxfp8`` (blocks of 32, scales powers of two), ``nvfp4``
            (blocks of 16, E4M3 scales) and ``fp8`` (E4M3, a scale an output row) are what engines run. Within blocks
            the mantissa decides: 8-bit ``e4m3`` rounds no better there than 6-bit ``e2m3``.
        group: Columns that share a scale; null means a whole row.
        scales: ``free``, 16 bits each; or with ZeroQuant-FP's constraints, which make casting to FP8 cheap: ``m1``,
            powers of two, or ``m2``, the row's largest scale times powers of two (section 4 there).
        order: Of the columns: ``given``, or by ``activation`` with scales made before any column is rounded.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self,
        *,
        formats: Sequence[str] = ("e2m1", "e2m3", "fp8"),
        group: int | None = 64,
        scales: str = "free",
        order: str = "given",
        damping: float = 0.01,
        column_block: int = 64,
    ) -> None:
        if not isinstance(formats, Sequence) or isinstance(formats, str) or not formats:
            raise SettingError("formats", allowed=f"a list of {', '.join(FORMATS)}", got=formats)
        self.formats = [check_choice("formats", name, FORMATS) for name in formats]
        if len(set(self.formats)) < len(self.formats):
            raise SettingError("formats", allowed="each format once", got=list(formats))
        self.group = None if group is None else check_int("group", group, low=1)
        self.scales = check_choice("scales", scales, tuple(CONSTRAINTS))
        if self.scales == "m2" and self.group is None and any(name in ELEMENTS for name in self.formats):
            raise SettingError(
                "scales", allowed=["free", "m1"], got=scales, hint="a whole row has one scale: set compressor.group"
            )
        self.order = check_choice("order", order, ORDERS)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a format, named after it, its nominal number the bits of one of its numbers.

        Raises:
            SettingError: A block does not divide some layer's input width, or two formats take the same bits.
        """
        for name in self.formats:
            spec = self._spec(name)
            setting = "formats" if name in BLOCKS else "group"
            check_divides(setting, spec.block or 1, shapes, got=name if name in BLOCKS else spec.block, owner=self)
        return {name: self._levels(*shape) for name, shape in shapes.items()}

    def _spec(self, name: str) -> FloatSpec:
        return BLOCKS.get(name) or FloatSpec(name, self.group, CONSTRAINTS[self.scales])

    def _levels(self, rows: int, columns: int) -> list[LevelSpec]:
        levels = []
        for name in self.formats:
            spec = self._spec(name)
            cost = float_blocks.bits(
                rows=rows, columns=columns, element=spec.element, block=spec.block or columns, scale=spec.scale
            )
            levels.append(LevelSpec(name, cost, Nominal("bits", float(ELEMENTS[spec.element].bits)), spec))
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
        made = self._rounded([weights[name] for name, _ in jobs], [level.spec for _, level in jobs], statistics)
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), payload in zip(jobs, made, strict=True):
            result[name][level.name] = payload
        return result

    def _rounded(
        self, weights: Sequence[torch.Tensor], specs: Sequence[FloatSpec], statistics: Statistics
    ) -> list[Payload]:
        """Return the payload of each matrix (rows, columns)."""
        gram = statistics.second_moment
        sizes = [len(weight) for weight in weights]
        work = stack_transposed(weights, gram)
        bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        stripes = [
            Stripe(slice(start, stop), spec, spec.block or len(work), work[:, start:stop])
            for start, stop, spec in zip(bounds[:-1], bounds[1:], specs, strict=True)
        ]
        order = torch.arange(len(work), device=work.device)
        if self.order == "activation":
            for stripe in stripes:
                stripe.measure_all(work)
            order = ColumnOrder.by_activation(gram).columns
            work = work[order]
            gram = gram[order][:, order]
        numbers = torch.empty_like(work)
        rules = self._rules(stripes, work, numbers, order)
        edges = len(work) if self.order == "activation" else math.gcd(*(stripe.block for stripe in stripes))
        spans = spans_of(len(work), edges=edges, block=self.column_block)
        total = sweep(work, factorize(gram, damping=self.damping), spans=spans, rules=rules)
        placed = torch.empty_like(numbers)
        placed[order] = numbers
        errors = sums_by_matrix(total, sizes)
        return [stripe.payload(placed, error) for stripe, error in zip(stripes, errors, strict=True)]

    def _rules(
        self, stripes: "Sequence[Stripe]", work: torch.Tensor, numbers: torch.Tensor, order: torch.Tensor
    ) -> Any:
        """Return what gives the rules of a span of columns.

        Args:
            stripes: Rows of each matrix.
            work: Weights transposed, in the order of the loop.
            numbers: Filled with numbers of the element formats, same shape.
            order: Index of each column of ``work`` in the weight.
        """
        limits = Limits.of(stripes, work.device)
        indices = order.tolist() if self.order == "activation" else range(len(work))

        def rules(columns: slice) -> ColumnRules:
            if self.order == "given":
                for stripe in stripes:
                    if columns.start % stripe.block == 0:
                        stripe.measure(work, columns.start)
            mine = [indices[index] for index in range(columns.start, columns.stop)]
            return ColumnRules(FloatColumns(stripes, limits, mine), numbers[columns])

        return rules

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return dict(vars(self))


@dataclass
class Stripe:
    """The rows of one matrix at one level, within the rows of all.

    Attributes:
        rows: Which they are.
        spec: The level.
        block: Columns that share a scale.
        weight: The matrix, transposed, shape (columns, rows).
        scales: Scales of each block that is reached, each of shape (rows,).
        whole: What scales are relative to: of ``nvfp4`` the layer's scale, of ``ratio`` the rows'; else 1.
    """

    rows: slice
    spec: FloatSpec
    block: int
    weight: torch.Tensor
    scales: dict[int, torch.Tensor] = field(default_factory=dict)
    whole: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        element = ELEMENTS[self.spec.element]
        largest = self.weight.abs().amax()
        self.whole = torch.ones((), device=self.weight.device)
        if self.spec.scale == "nvfp4":
            self.whole = (largest / (ELEMENTS["e4m3"].largest * element.largest)).clamp(min=LEAST)
        if self.spec.scale == "ratio":
            by_row = self.weight.abs().amax(dim=0) / element.largest
            self.whole = by_row.half().float().clamp(min=LEAST)

    def measure_all(self, work: torch.Tensor) -> None:
        """Make the scales of all blocks from weights as they are, transposed."""
        for start in range(0, len(work), self.block):
            self.measure(work, start)

    def measure(self, work: torch.Tensor, start: int) -> None:
        """Make the scales of the block that starts at a column.

        Args:
            work: Weights of all matrices, transposed, in their own order.
            start: Index of the column.
        """
        largest = work[start : start + self.block, self.rows].abs().amax(dim=0)
        self.scales[start // self.block] = scales_of(largest, self.spec, whole=self.whole)

    def scale(self, column: int) -> torch.Tensor:
        """Return the scales of a column of the weight, shape (rows,)."""
        return self.scales[column // self.block]

    def payload(self, numbers: torch.Tensor, error: float) -> Payload:
        """Return the payload of the matrix.

        Args:
            numbers: Of the element format, all matrices side by side, shape (columns, all rows).
            error: Output error.
        """
        mine = numbers[:, self.rows].T
        scales = torch.stack([self.scales[index] for index in sorted(self.scales)], dim=1)
        stored = float_blocks.encode_scales(scales, self.spec.scale, whole=self.whole)
        tensors = float_blocks.encode(values=mine, scales=stored, element=self.spec.element)
        rows, columns = mine.shape
        meta = {
            "rows": rows,
            "columns": columns,
            "element": self.spec.element,
            "block": self.block,
            "scale": self.spec.scale,
        }
        return Payload(float_blocks.__name__, tensors, meta, error=error)


def scales_of(largest: torch.Tensor, spec: FloatSpec, *, whole: torch.Tensor) -> torch.Tensor:
    """Return scales that a level can hold, for blocks with these largest values; fp32, shape (rows,).

    MX scales are 2^(⌊log2 largest⌋ − exponent of the element's largest value) (OCP Microscaling Formats 1.0, section
    6.3). With S the scale at which the largest value is the format's, ZeroQuant-FP's M1 is 2^⌈log2 S⌉ and its M2
    S_row / 2^⌊log2(S_row / S)⌋.

    Args:
        largest: Largest absolute weight of each row's block, shape (rows,).
        spec: The level.
        whole: What scales are relative to, as in ``Stripe``.
    """
    element = ELEMENTS[spec.element]
    wanted = (largest / element.largest).clamp(min=LEAST)
    if spec.scale == "e8m0" and spec.saturates:
        return torch.exp2(largest.clamp(min=LEAST).log2().floor() - element.largest_exponent)
    if spec.scale == "e8m0":
        return torch.exp2(wanted.log2().ceil())
    if spec.scale == "ratio":
        return whole * torch.exp2(-(whole / wanted).log2().floor().clamp(0, MOST_RATIO))
    if spec.scale == "nvfp4":
        relative = (wanted / whole).clamp(max=ELEMENTS["e4m3"].largest).to(torch.float8_e4m3fn).float()
        return relative.clamp(min=LEAST_E4M3) * whole
    return wanted if spec.scale == "fp32" else wanted.half().float()


@dataclass(frozen=True)
class Limits:
    """What rounding needs to know of each row's format, fp32, shape (rows,): mantissa, least exponent, largest."""

    mantissa: torch.Tensor
    least: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(cls, stripes: Sequence[Stripe], device: torch.device) -> "Limits":
        """Return the limits of the rows of all matrices."""
        kinds = [ELEMENTS[stripe.spec.element] for stripe in stripes]
        counts = torch.tensor([stripe.rows.stop - stripe.rows.start for stripe in stripes])
        table = torch.tensor([[kind.mantissa, kind.least_exponent, kind.largest] for kind in kinds])
        mantissa, least, largest = table.repeat_interleave(counts, dim=0).to(device).unbind(dim=1)
        return cls(mantissa.contiguous(), least.contiguous(), largest.contiguous())


@dataclass(frozen=True)
class FloatColumns:
    """The grids of a span of columns.

    Attributes:
        stripes: Rows of each matrix, with their scales.
        limits: Of each row's format.
        columns: Index of each column of the span in the weight.
    """

    stripes: Sequence[Stripe]
    limits: Limits
    columns: Sequence[int]
    made: "dict[tuple[int, ...], FloatGrid]" = field(default_factory=dict)

    def at(self, column: int) -> "FloatGrid":
        """Return the grid of a column, by its index in the span; columns of the same blocks have the same."""
        own = self.columns[column]
        blocks = tuple(own // stripe.block for stripe in self.stripes)
        if blocks not in self.made:
            self.made[blocks] = FloatGrid(torch.cat([stripe.scale(own) for stripe in self.stripes]), self.limits)
        return self.made[blocks]


@dataclass(frozen=True)
class FloatGrid:
    """Numbers of each row's format, times its scale; as codes serve the numbers themselves, fp32."""

    scale: torch.Tensor
    limits: Limits

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest number of each row's format, fp32, shape (rows,)."""
        limits = self.limits
        return float_blocks.rounded(
            weight / self.scale, mantissa=limits.mantissa, least=limits.least, largest=limits.largest
        )

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that numbers stand for, fp32, shape (rows,)."""
        return codes * self.scale
