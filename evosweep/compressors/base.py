"""The contract of a compressor: it plans the levels of a layer from its shape, and makes them from its weight."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from evosweep.compressors.payload import Payload, layer_error
from evosweep.compressors.statistics import Statistics
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

__all__ = [
    "Compressor",
    "LevelSpec",
    "Payload",
    "Plans",
    "Statistics",
    "check_divides",
    "identity",
    "layer_error",
    "undominated",
]


@dataclass(frozen=True)
class LevelSpec:
    """A level before it is made: everything that follows from the layer's shape.

    Attributes:
        name: Short, unique within the unit.
        cost: Exact size in bits.
        nominal: The number that users name it by, and what kind of number that is.
        spec: How to make it: a frozen dataclass of the compressor's own, which nobody else reads.
        removed: Share of the layer's weights that the level removes.
    """

    name: str
    cost: int
    nominal: Nominal
    spec: Any
    removed: float = 0.0


Plans = Mapping[str, Sequence[LevelSpec]]
"""Levels of every unit, by unit name, each by rising cost."""


class Compressor(Protocol):
    """Makes levels of linear layers."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that ``compress`` reads; nothing else is measured for it.

        Each is a module of ``evosweep.store.statistics`` (``second_moment``, ``output_gradient_square`` ...) or the
        dotted path of a module elsewhere.
        """

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        """Return the levels of all units of a model.

        Args:
            shapes: (out, in) by unit name; all units at once, so that levels can step alike in every unit.

        Raises:
            SettingError: A setting does not fit a shape.
        """

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload for layers that share one input, in the order of their plans.

        A level that is not worth offering may be left out, never a unit's cheapest.

        Args:
            weights: fp32 weights by unit name, each (out, in) with the same in.
            statistics: What was measured of the shared input, as declared in ``needs``.
            plans: What ``plan`` returned.
        """

    def describe(self) -> dict[str, Any]:
        """Return every setting that changes a payload, as JSON; it is part of the store's address."""


GROUP_OR_ROW = "null or a divisor of every input width"
"""What a group may be where null is a whole row."""


def check_divides(
    setting: str,
    size: int,
    shapes: Mapping[str, tuple[int, int]],
    *,
    allowed: str = "a divisor of every input width",
    got: object = None,
    owner: object = None,
    hint: str = "",
) -> None:
    """Raise unless ``size`` divides every layer's input width.

    Args:
        setting: Name of the argument that set the size.
        size: Columns of a group or pattern.
        shapes: (out, in) by unit name.
        allowed: What the argument may be.
        got: The refused value to show, where that is not ``size``.
        owner: The object whose argument it is.
        hint: What else would do.

    Raises:
        SettingError: It names the layers that the size does not fit, and the sizes that would.
    """
    unfit = [name for name, (_, columns) in shapes.items() if columns % size]
    if unfit:
        widths = ", ".join(map(str, sorted({shapes[name][1] for name in unfit})))
        common = math.gcd(*(columns for _, columns in shapes.values()))
        raise SettingError(
            setting,
            owner=owner,
            got=size if got is None else got,
            allowed=f"{allowed}: {len(unfit)} layers ({unfit[0]} ...) have {widths}, and "
            f"what divides {common} fits all",
            hint=hint,
        )


def identity(compressor: Compressor) -> dict[str, Any]:
    """Return a compressor's class and settings, as JSON."""
    return {"kind": f"{type(compressor).__module__}.{type(compressor).__qualname__}", **compressor.describe()}


def undominated(
    levels: Sequence[LevelSpec],
    errors: Mapping[str, float],
    *,
    rivals: Callable[[LevelSpec, LevelSpec], bool] | None = None,
) -> list[LevelSpec]:
    """Return the levels that no rival dominates: none costs no more, errs no more, and is better in one of the two.

    Args:
        levels: Levels of one unit.
        errors: Output error by level name.
        rivals: Whether a level may be dominated by another; None lets every pair compete.
    """

    def dominates(other: LevelSpec, level: LevelSpec) -> bool:
        ours = (level.cost, errors[level.name])
        theirs = (other.cost, errors[other.name])
        return theirs[0] <= ours[0] and theirs[1] <= ours[1] and theirs != ours

    return [
        level
        for level in levels
        if not any(dominates(other, level) and (rivals is None or rivals(level, other)) for other in levels)
    ]
