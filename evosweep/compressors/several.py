"""Levels of more than one kind in one unit: bit-widths beside sparsities, in one ladder by cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from evosweep.compressors.base import Compressor, LevelPlan, Payload, Plans, identity
from evosweep.core.checks import check_bool
from evosweep.core.errors import SettingError


class Several:
    """What several compressors make, offered together.

    Args:
        parts: Compressors by a name of their own; no two may make a level of one name.
        dominated: Whether to keep levels that another part's level beats: no dearer, and no larger an output error.
            Steps up the ladder that do harm make a search longer.
    """

    def __init__(self, *, parts: Mapping[str, Compressor], dominated: bool = False) -> None:
        if not isinstance(parts, Mapping) or not parts:
            raise SettingError("parts", allowed="compressors by name", got=parts)
        self.parts = dict(parts)
        self.dominated = check_bool("dominated", dominated)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelPlan]]:
        """Return every unit's levels of all parts by rising cost, each with the name of its maker.

        Raises:
            SettingError: Two parts make a level of one name, or a part's setting does not fit a shape.
        """
        ladders: dict[str, list[LevelPlan]] = {}
        for maker, part in self.parts.items():
            for unit, ladder in part.plan(shapes).items():
                ladders.setdefault(unit, []).extend(replace(level, maker=maker) for level in ladder)
        for unit, ladder in ladders.items():
            names = [level.name for level in ladder]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise SettingError("parts", owner=self, allowed="compressors with levels of different names", got=twice)
            ladders[unit] = sorted(ladder, key=lambda level: level.cost)
        return ladders

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload, in the order of the ladders, dominated levels left out unless asked.

        Raises:
            StoreError: A part cannot make its levels.
        """
        made: dict[str, dict[str, Payload]] = {unit: {} for unit in weights}
        for maker, part in self.parts.items():
            own = {unit: [level for level in ladder if level.maker == maker] for unit, ladder in plans.items()}
            for unit, payloads in part.compress(weights, gram, own).items():
                made[unit].update(payloads)
        result: dict[str, dict[str, Payload]] = {}
        for unit, payloads in made.items():
            errors = {name: payload.output_error(weights[unit], gram) for name, payload in payloads.items()}
            kept = [level for level in plans[unit] if self.dominated or not _beaten(level, plans[unit], errors)]
            result[unit] = {level.name: payloads[level.name] for level in kept}
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        parts = {maker: identity(part) for maker, part in self.parts.items()}
        return {"parts": parts, "dominated": self.dominated}


def _beaten(level: LevelPlan, ladder: Sequence[LevelPlan], errors: Mapping[str, float]) -> bool:
    return any(
        other.maker != level.maker
        and (other.cost, errors[other.name]) < (level.cost, errors[level.name])
        and errors[other.name] <= errors[level.name]
        for other in ladder
    )
