"""What a compressor is: it names the levels of a layer from its shape, and makes their payloads from its weight."""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from evosweep.core.errors import SettingError, StoreError
from evosweep.core.unit import Nominal


@dataclass(frozen=True)
class LevelPlan:
    """A level before it is made: all that follows from the layer's shape.

    Attributes:
        name: Short, unique within the unit.
        cost: Exact size in bits.
        nominal: The number that users name it by, and of what kind that is.
        kept: Weights that are not removed; 0 where the level removes none.
        group: M of an N:M pattern: of every M weights that follow each other in a row, as many are kept; 0: anywhere.
        width: Bits a code, where a level may have one of several; 0 where that is not the plan's to say.
        maker: Which of several compressors makes it.
    """

    name: str
    cost: int
    nominal: Nominal
    kept: int = 0
    group: int = 0
    width: int = 0
    maker: str = ""


@dataclass(frozen=True)
class Payload:
    """A compressed layer.

    Attributes:
        format: Module of ``compressors/formats`` that decodes it.
        parts: Tensors by name.
        meta: Whole numbers that decoding needs.
        error: What ``layer_error`` would measure of it, where the compressor knows that from its work.
    """

    format: str
    parts: Mapping[str, torch.Tensor]
    meta: Mapping[str, int]
    error: float | None = None

    @cached_property
    def weight(self) -> torch.Tensor:
        """What it stands for: fp32, shape (out, in)."""
        return decode(self.format, self.parts, self.meta)

    def output_error(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        """Return the layer's output error, measured where the compressor does not know it; arguments as it had."""
        return layer_error(weight - self.weight, gram) if self.error is None else self.error


Plans = Mapping[str, Sequence[LevelPlan]]
"""Levels of every unit, by unit name, each by rising cost."""


class Compressor(Protocol):
    """Makes levels of linear layers."""

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        """Return the levels of all units of a model.

        Args:
            shapes: (out, in) by unit name; all units at once, so that levels can step alike in every unit.

        Raises:
            SettingError: A setting does not fit a shape.
        """

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload for layers that share one input, in the order of the ladders.

        A level that is not worth offering may be left out, never a unit's cheapest.

        Args:
            weights: fp32 weights by unit name, each (out, in) with the same in.
            gram: XᵀX / tokens of the shared input X, fp32, shape (in, in).
            plans: What ``plan`` returned.
        """

    def describe(self) -> dict[str, Any]:
        """Return every setting that changes a payload; part of the store's address."""


def check_divides(
    setting: str, size: int, shapes: Mapping[str, tuple[int, int]], *, got: object = None, owner: object = None
) -> None:
    """Raise unless ``size`` divides every layer's input width.

    Raises:
        SettingError: Says which layers it does not fit, and what would.
    """
    unfit = [name for name, (_, columns) in shapes.items() if columns % size]
    if unfit:
        widths = ", ".join(map(str, sorted({shapes[name][1] for name in unfit})))
        common = math.gcd(*(columns for _, columns in shapes.values()))
        raise SettingError(
            setting,
            owner=owner,
            got=size if got is None else got,
            allowed=f"null or a divisor of every input width: {len(unfit)} layers ({unfit[0]} ...) have {widths}, and "
            f"what divides {common} fits all",
        )


def identity(compressor: Compressor) -> dict[str, Any]:
    """Return which compressor it is, and its settings."""
    return {"kind": f"{type(compressor).__module__}.{type(compressor).__qualname__}", **compressor.describe()}


def layer_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Return the mean over inputs x of w·‖D x‖², D = ``difference`` (out, in), from ``gram`` = mean of w·x xᵀ."""
    return max(0.0, float(((difference @ gram) * difference).sum(dtype=torch.float64)))


def decode(format_name: str, parts: Mapping[str, torch.Tensor], meta: Mapping[str, int]) -> torch.Tensor:
    """Return the fp32 weight (out, in) of a payload.

    Raises:
        StoreError: No such format.
    """
    if not format_name.isidentifier():
        raise StoreError(f"{format_name!r} is not the name of a payload format")
    try:
        module = importlib.import_module(f"evosweep.compressors.formats.{format_name}")
    except ModuleNotFoundError as error:
        raise StoreError(f"this evosweep knows no payload format {format_name!r}") from error
    weight: torch.Tensor = module.decode(parts, meta)
    return weight
