"""Levels of several compressors in one unit: bit-widths beside sparsities, ordered by cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from evosweep.compressors.base import Compressor, LevelSpec, Plans, identity, undominated
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_bool
from evosweep.core.errors import SettingError


@dataclass(frozen=True)
class PartSpec:
    """A level that one of several compressors makes.

    Attributes:
        part: Name of the compressor.
        level: The level as that compressor planned it.
    """

    part: str
    level: LevelSpec


class Several:
    """Offers the levels of several compressors together.

    A dominated level is one that another level of the unit beats: it costs no more, its output error is no larger, and
    one of the two is smaller. A search gains nothing from such levels and takes longer.

    Args:
        parts: Compressors by name; no two may make a level of the same name.
        dominated: Whether to keep levels that are dominated by a level of another part.
        dominated_within: Whether to keep levels that are dominated by a level of the same part.
    """

    def __init__(
        self, *, parts: Mapping[str, Compressor], dominated: bool = False, dominated_within: bool = True
    ) -> None:
        if not isinstance(parts, Mapping) or not parts:
            raise SettingError("parts", allowed="compressors by name", got=parts)
        self.parts = dict(parts)
        self.dominated = check_bool("dominated", dominated)
        self.dominated_within = check_bool("dominated_within", dominated_within)

    @cached_property
    def needs(self) -> frozenset[str]:
        """All statistics that its compressors need, and the second moment where levels are compared by their errors."""
        compares = not (self.dominated and self.dominated_within)
        own = {SECOND_MOMENT} if compares else set()
        return frozenset(own.union(*(part.needs for part in self.parts.values())))

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return every unit's levels of all parts, by rising cost.

        Raises:
            SettingError: Two parts make a level of one name, or a part's setting does not fit a shape.
        """
        plans: dict[str, list[LevelSpec]] = {}
        for part, compressor in self.parts.items():
            for unit, levels in compressor.plan(shapes).items():
                plans.setdefault(unit, []).extend(replace(level, spec=PartSpec(part, level)) for level in levels)
        for unit, levels in plans.items():
            names = [level.name for level in levels]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise SettingError("parts", owner=self, allowed="compressors with levels of different names", got=twice)
            plans[unit] = sorted(levels, key=lambda level: level.cost)
        return plans

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload, in the order of the plans, without dominated levels unless asked.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: Everything that the parts need.
            plans: What ``plan`` returned.

        Raises:
            StoreError: A part cannot make its levels.
        """
        made: dict[str, dict[str, Payload]] = {unit: {} for unit in weights}
        for part, compressor in self.parts.items():
            own = {
                unit: [level.spec.level for level in levels if level.spec.part == part]
                for unit, levels in plans.items()
            }
            for unit, payloads in compressor.compress(weights, statistics.only(compressor.needs), own).items():
                made[unit].update(payloads)
        return {
            unit: {
                level.name: payloads[level.name] for level in self._worth(unit, weights, statistics, plans, payloads)
            }
            for unit, payloads in made.items()
        }

    def _worth(
        self,
        unit: str,
        weights: Mapping[str, torch.Tensor],
        statistics: Statistics,
        plans: Plans,
        payloads: Mapping[str, Payload],
    ) -> list[LevelSpec]:
        """Return the levels of a unit that are offered."""
        levels = [level for level in plans[unit] if level.name in payloads]
        if self.dominated and self.dominated_within:
            return levels
        moment = statistics.second_moment
        errors = {name: payload.output_error(weights[unit], moment) for name, payload in payloads.items()}
        return undominated(levels, errors, rivals=self._compete)

    def _compete(self, level: LevelSpec, other: LevelSpec) -> bool:
        same = level.spec.part == other.spec.part
        return not (self.dominated_within if same else self.dominated)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        parts = {part: identity(compressor) for part, compressor in self.parts.items()}
        return {"parts": parts, "dominated": self.dominated, "dominated_within": self.dominated_within}


def single(compressor: Compressor) -> list[Compressor]:
    """Return the compressors that one consists of: those inside a ``Several``, or itself."""
    if isinstance(compressor, Several):
        return [found for part in compressor.parts.values() for found in single(part)]
    return [compressor]
