"""Levels that are types of ggml: what llama.cpp loads as it is, at the size that its files have."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans
from evosweep.compressors.column_order import ORDERS, ColumnOrder
from evosweep.compressors.compensate import ColumnRules, Factor, factorize, spans_of, stack_transposed, sweep
from evosweep.compressors.formats import ggml_blocks
from evosweep.compressors.formats.ggml_layout import TYPES, Blocks, BlockType, pack
from evosweep.compressors.ggml_fit import FitSettings, fit_blocks, nearest_codes
from evosweep.compressors.grid import GridTable
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, SECOND_MOMENT_DIAGONAL, Statistics
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

NAMES = (*TYPES, *(name for name in ggml_blocks.PLAIN if name != "F32"))
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "IQ4_NL",
    "Q5_K": "Q5_0",
    "Q6_K": "Q8_0",
    "Q2_0": "Q4_0",
}
"""What is used where a type's blocks do not divide a layer's inputs: as in llama.cpp, but of the same size for 4 and 5
bits, where llama.cpp takes Q5_0 and Q5_1."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgmlSpec:
    """A level.

    Attributes:
        kind: Name of the type.
    """

    kind: str


class GGUF:
    """Quantization to the block types of ggml, steered by the inputs' second moment.

    Args:
        types: Names of types, in any order: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, IQ4_XS ... and F16, BF16. Where the
            blocks of one do not divide a layer's inputs, another is used (FALLBACKS); of types that then have the same
            size, the first.
        compensate: Whether a column's error is moved onto the columns that follow (GPTQ), which no tool for GGUF does.
        importance: Whether scales are chosen by the inputs' second moment, as llama.cpp does with an importance
            matrix; false: all columns count alike, and without ``compensate`` nothing is measured.
        order: Of the columns, where errors are compensated: ``given``, or by ``activation``.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
        steps: Ranges that are tried for each scale.
        rounds: How often the scales of a block of 256 and what they are multiples of are improved in turn.
    """

    def __init__(
        self,
        *,
        types: Sequence[str] = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
        compensate: bool = True,
        importance: bool = True,
        order: str = "activation",
        damping: float = 0.01,
        column_block: int = 64,
        steps: int = 16,
        rounds: int = 2,
    ) -> None:
        if not isinstance(types, Sequence) or isinstance(types, str) or not types:
            raise SettingError("types", allowed=f"a list of {', '.join(NAMES)}", got=types)
        self.types = [check_choice("types", name, NAMES) for name in types]
        if len(set(self.types)) < len(self.types):
            raise SettingError("types", allowed="each type once", got=list(types))
        self.compensate = check_bool("compensate", compensate)
        self.importance = check_bool("importance", importance)
        self.order = check_choice("order", order, ORDERS)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)
        self.fit = FitSettings(steps=check_int("steps", steps, low=1), rounds=check_int("rounds", rounds, low=0))
        self._told: set[int] = set()

    @property
    def needs(self) -> frozenset[str]:
        """The second moment if errors are compensated, else its diagonal, else nothing."""
        if self.compensate:
            return frozenset({SECOND_MOMENT})
        return frozenset({SECOND_MOMENT_DIAGONAL} if self.importance else ())

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a type, named after it, by rising cost; nominal are its bits a weight.

        Raises:
            SettingError: No type can hold some layer.
        """
        self._tell(shapes)
        return {name: self._levels(name, *shape) for name, shape in shapes.items()}

    def _levels(self, unit: str, rows: int, columns: int) -> list[LevelSpec]:
        kinds = self._kinds(columns)
        if not kinds:
            raise SettingError(
                "types", owner=self, got=self.types, allowed=f"one for {unit}, which has {columns} inputs: F16"
            )
        by_cost: dict[int, LevelSpec] = {}
        for kind in kinds:
            cost = ggml_blocks.bits(rows=rows, columns=columns, kind=kind)
            bits = TYPES[kind].bits if kind in TYPES else 16.0
            by_cost.setdefault(cost, LevelSpec(kind, cost, Nominal("bits", bits), GgmlSpec(kind)))
        return [by_cost[cost] for cost in sorted(by_cost)]

    def _kinds(self, columns: int) -> list[str]:
        """Return the types that layers of so many inputs have, in the order in which they were listed."""
        found = [held(name, columns) for name in self.types]
        return [name for name in dict.fromkeys(found) if name is not None]

    def _tell(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Say once for each number of inputs what is used there instead."""
        widths = {columns for _, columns in shapes.values()} - self._told
        for columns in sorted(widths):
            self._told.add(columns)
            instead = {name: held(name, columns) for name in self.types}
            changed = [f"{other or 'nothing'} for {name}" for name, other in instead.items() if other != name]
            if changed:
                count = sum(width == columns for _, width in shapes.values())
                logger.warning("layers with %d inputs (%d) have %s", columns, count, ", ".join(changed))

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment, or its diagonal, if anything is measured.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The second moment stays singular whatever the damping.
        """
        gram = statistics.second_moment if self.compensate else None
        order = ColumnOrder.by_activation(gram) if gram is not None and self.order == "activation" else None
        factor = None
        if gram is not None:
            factor = factorize(gram if order is None else order.moment(gram), damping=self.damping)
        made: dict[str, dict[str, Payload]] = {}
        for name, weight in weights.items():
            square = self._importance(weight, statistics)
            made[name] = {}
            for level in plans[name]:
                kind = level.spec.kind
                if kind in ggml_blocks.PLAIN:
                    made[name][level.name] = ggml_blocks.encode(weight.float(), kind)
                    continue
                blocks = fit_blocks(weight.float(), square, TYPES[kind], self.fit)
                error = None
                if gram is not None and factor is not None:
                    blocks, error = self._compensated(weight, blocks, TYPES[kind], gram, factor, order)
                stored = pack(blocks, kind).view(len(weight), -1)
                payload = ggml_blocks.encode(stored, kind)
                made[name][level.name] = Payload(payload.format, payload.tensors, payload.meta, error=error)
        return made

    def _importance(self, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        if not self.importance:
            return torch.ones(weight.shape[1], device=weight.device)
        return statistics.second_moment.diagonal() if self.compensate else statistics.second_moment_diagonal

    def _compensated(
        self,
        weight: torch.Tensor,
        blocks: Blocks,
        kind: BlockType,
        gram: torch.Tensor,
        factor: Factor,
        order: ColumnOrder | None,
    ) -> tuple[Blocks, float]:
        """Return blocks with codes chosen column by column, and the layer's output error.

        Args:
            weight: Shape (out, in).
            blocks: With the scales that stay.
            kind: Their type.
            gram: Second moment of the inputs.
            factor: Its factor, columns in ``order``.
            order: Of the columns; None: as given.
        """
        scale, added = (values.view(len(weight), -1).T.contiguous() for values in blocks.grid(kind))
        work = stack_transposed([weight], gram)
        columns = torch.arange(len(work), device=work.device) if order is None else order.columns
        work = work[columns]
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)

        def rules(span: slice) -> ColumnRules:
            places = columns[span] // kind.part
            if kind.values is not None:
                return ColumnRules(ValueColumns(scale, kind, places), codes[span])
            top = torch.full((len(weight),), float(kind.top), device=work.device)
            return ColumnRules(GridTable(scale, float(kind.zero or 0) - added / scale, top, places), codes[span])

        spans = spans_of(len(work), edges=len(work), block=self.column_block)
        error = float(sweep(work, factor, spans=spans, rules=rules).sum())
        placed = ColumnOrder(columns).back(codes).T.reshape(-1, kind.block)
        return Blocks(placed, blocks.d, blocks.m, blocks.scales, blocks.minima), error

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**own, "fit": vars(self.fit)}


def held(name: str, columns: int) -> str | None:
    """Return the type that is used for a type in layers of so many inputs: itself, or a fallback; None: there is none.

    Args:
        name: Of the type.
        columns: Inputs of the layer.
    """
    found: str | None = name
    while found in TYPES and columns % TYPES[found].block:
        found = FALLBACKS.get(found)
    return found


@dataclass(frozen=True)
class ValueColumns:
    """The grids of a span of columns whose codes stand for values of a table.

    Attributes:
        scales: Shape (parts, rows).
        kind: The type.
        parts: Part of each column, shape (columns,).
    """

    scales: torch.Tensor
    kind: BlockType
    parts: torch.Tensor

    def at(self, column: int) -> "ValueGrid":
        """Return the grid of a column, by its index in the span."""
        return ValueGrid(self.scales[self.parts[column]], self.kind)


@dataclass(frozen=True)
class ValueGrid:
    """The values of a type's table, times each row's scale."""

    scale: torch.Tensor
    kind: BlockType

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codes of the nearest values, fp32, shape (rows,)."""
        return nearest_codes(weight, self.scale, torch.zeros_like(self.scale), self.kind)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that codes stand for, fp32, shape (rows,)."""
        table = torch.tensor(self.kind.values, dtype=torch.float32, device=codes.device)
        return self.scale * table[codes.long()]
