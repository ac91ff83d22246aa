"""Makes levels of ggml's block types, whose bytes llama.cpp loads unchanged."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans
from evosweep.compressors.column_order import ORDERS, ColumnOrder
from evosweep.compressors.compensate import factorize, parts_of, stack_transposed
from evosweep.compressors.formats import ggml_blocks
from evosweep.compressors.formats.ggml_layout import IQ4_VALUES, TYPES, pack
from evosweep.compressors.ggml_columns import ColumnLoop, Made
from evosweep.compressors.ggml_fit import FitSettings, fit_blocks
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, SECOND_MOMENT_DIAGONAL, Statistics
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

NAMES = (*TYPES, *(name for name in ggml_blocks.PLAIN if name != "F32"))
FALLBACKS = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "IQ4_NL",
    "Q5_K": "Q5_0",
    "Q6_K": "Q8_0",
    "Q2_0": "IQ4_NL",
}
"""What is used where a type's blocks do not divide a layer's inputs: the next larger type with blocks of 32, or one of
the same size. llama.cpp takes Q4_0, IQ4_NL, Q5_0, Q5_1 and Q8_0; IQ4_NL errs less than Q4_0 at the same size."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgmlSpec:
    """Names the ggml block type of a level.

    Attributes:
        kind: Name of the type.
    """

    kind: str


class GgmlTypes:
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
            instead: dict[str, list[str]] = {}
            for name in self.types:
                instead.setdefault(held(name, columns) or "nothing", []).append(name)
            changed = [f"{other} for {', '.join(names)}" for other, names in instead.items() if names != [other]]
            if changed:
                count = sum(width == columns for _, width in shapes.values())
                logger.warning("layers with %d inputs (%d) have %s", columns, count, "; ".join(changed))

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
        jobs = [(name, level) for name in weights for level in plans[name]]
        found: list[Made] = []
        for name, level in jobs:
            kind = TYPES.get(level.spec.kind)
            square = self._importance(weights[name], statistics)
            found.append((None if kind is None else fit_blocks(weights[name].float(), square, kind, self.fit), None))
        if self.compensate:
            found = self._compensated(
                [weights[name] for name, _ in jobs], [level for _, level in jobs], found, statistics
            )
        made: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), (blocks, error) in zip(jobs, found, strict=True):
            kind_name = level.spec.kind
            weight = weights[name].float()
            stored = weight if blocks is None else pack(blocks, kind_name).view(len(weight), -1)
            made[name][level.name] = replace(ggml_blocks.encode(stored, kind_name), error=error)
        return made

    def _importance(self, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        if not self.importance:
            return torch.ones(weight.shape[1], device=weight.device)
        return statistics.second_moment.diagonal() if self.compensate else statistics.second_moment_diagonal

    def _compensated(
        self,
        weights: Sequence[torch.Tensor],
        levels: Sequence[LevelSpec],
        found: Sequence[Made],
        statistics: Statistics,
    ) -> list[Made]:
        """Return blocks with codes chosen column by column, and the layers' output errors.

        Args:
            weights: Of every job, shape (out, in).
            levels: Of every job.
            found: Blocks with the scales that stay; None where there are none.
            statistics: The shared input's second moment.
        """
        gram = statistics.second_moment
        order = ColumnOrder(torch.arange(len(gram), device=gram.device))
        if self.order == "activation":
            order = ColumnOrder.by_activation(gram)
        factor = factorize(order.moment(gram), damping=self.damping)
        made = list(found)
        for table in (None, IQ4_VALUES):
            chosen = [
                job
                for job, (level, (blocks, _)) in enumerate(zip(levels, found, strict=True))
                if blocks is not None and TYPES[level.spec.kind].values == table
            ]
            for part in parts_of([weights[job] for job in chosen]) if chosen else ():
                some = chosen[part]
                kinds = [TYPES[levels[job].spec.kind] for job in some]
                grids = [blocks for blocks, _ in (found[job] for job in some) if blocks is not None]
                work = stack_transposed([weights[job] for job in some], gram)
                loop = ColumnLoop(work, grids, kinds, order=order)
                made_here = loop.run(factor, column_block=self.column_block)
                for job, outcome in zip(some, made_here, strict=True):
                    made[job] = outcome
        return made

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
    while name in TYPES and columns % TYPES[name].block:
        if name not in FALLBACKS:
            return None
        name = FALLBACKS[name]
    return name
