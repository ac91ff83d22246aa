"""Base of pruners: levels that step by the same number of weights in every unit, and their payloads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, check_divides
from evosweep.compressors.formats import bitmask
from evosweep.compressors.payload import Payload
from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

STEPS_IN_SMALLEST = 4
Pattern = tuple[int, int]
"""N and M of an N:M pattern: of every M consecutive weights of a row, N are kept."""


@dataclass(frozen=True)
class SparseSpec:
    """A level that removes weights.

    Attributes:
        kept: Weights that are kept.
        pattern: The N:M pattern in which they are kept; None keeps them anywhere.
    """

    kept: int
    pattern: Pattern | None = None


class SparseLevels:
    """A ladder of sparsities around one.

    All units step by the same number of weights, so that one unit's step down pays for another's step up exactly
    (EvoPress, arXiv 2410.14649, section 4).

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit, so that it has levels too.
        patterns: N:M patterns (``2:4``) that are the levels instead, with the dense layer above them: of every M
            consecutive weights of a row, N are kept.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        window: float = 0.25,
        step: int | None = None,
        patterns: Sequence[str] | None = None,
    ) -> None:
        self.sparsity = check_number("sparsity", sparsity, low=0, high=1)
        self.window = check_number("window", window, low=0, high=1)
        self.step = None if step is None else check_int("step", step, low=1)
        self.patterns = (
            None
            if patterns is None
            else [parse_pattern(f"patterns[{index}]", pattern) for index, pattern in enumerate(patterns)]
        )

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return the levels of every unit, densest last, named by sparsity: ``62.5%``.

        Raises:
            SettingError: No level is left in a unit.
        """
        if self.patterns is not None:
            return {name: self._patterned(shapes, name) for name in shapes}
        numels = {name: rows * columns for name, (rows, columns) in shapes.items()}
        step = self.step or max(1, min(numels.values()) // STEPS_IN_SMALLEST)
        return {name: self._levels(name, numel, step) for name, numel in numels.items()}

    def _levels(self, name: str, numel: int, step: int) -> list[LevelSpec]:
        middle = numel - round(self.sparsity * numel / step) * step
        reach = int(self.window * numel / step)
        kept = [middle + steps * step for steps in range(-reach, reach + 1)]
        kept = [count for count in kept if 0 < count <= numel]
        if not kept:
            raise SettingError(
                "step", owner=self, allowed=f"small enough for {name}, which has {numel} weights", got=step
            )
        return [
            LevelSpec(
                name=f"{100 * (1 - count / numel):.6g}%",
                cost=bitmask.bits(numel=numel, kept=count),
                nominal=Nominal("sparsity", 1 - count / numel),
                spec=SparseSpec(count),
                removed=1 - count / numel,
            )
            for count in kept
        ]

    def _patterned(self, shapes: Mapping[str, tuple[int, int]], name: str) -> list[LevelSpec]:
        numel = shapes[name][0] * shapes[name][1]
        levels = [
            LevelSpec(
                name="dense",
                cost=bitmask.bits(numel=numel, kept=numel),
                nominal=Nominal("sparsity", 0.0),
                spec=SparseSpec(numel),
            )
        ]
        for few, many in self.patterns or ():
            check_divides("M of patterns", many, shapes, got=f"{few}:{many}", owner=self)
            kept = numel // many * few
            cost = bitmask.bits(numel=numel, kept=kept)
            nominal = Nominal("sparsity", 1 - few / many)
            spec = SparseSpec(kept, (few, many))
            levels.append(LevelSpec(f"{few}:{many}", cost, nominal, spec, removed=1 - kept / numel))
        return sorted(levels, key=lambda level: level.cost)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {"sparsity": self.sparsity, "window": self.window, "step": self.step, "patterns": self.patterns}


def payload_of(weight: torch.Tensor, mask: torch.Tensor, *, error: float | None = None) -> Payload:
    """Return the payload of a pruned layer.

    Args:
        weight: Shape (rows, columns).
        mask: True where a weight is kept, same shape.
        error: The layer's output error, where it is known.
    """
    rows, columns = weight.shape
    return Payload(bitmask.__name__, bitmask.encode(weight, mask), {"rows": rows, "columns": columns}, error=error)


def parse_pattern(setting: str, pattern: object) -> Pattern:
    """Return N and M of ``N:M``.

    Raises:
        SettingError: Not of that form, or N is not below M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise SettingError(setting, allowed="N:M with 0 < N < M, such as 2:4", got=pattern)
    return int(found[1]), int(found[2])


def keep_pattern(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return a mask of the N largest of every M consecutive scores of a row, shape (rows, columns)."""
    few, many = pattern
    grouped = scores.reshape(-1, many)
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, grouped.topk(few, dim=1).indices, True).view(scores.shape)


def keep_largest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Return a mask of exactly the ``kept`` largest scores, whatever their ties; same shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(scores.flatten(), kept, sorted=False).indices] = True
    return mask.view(scores.shape)
