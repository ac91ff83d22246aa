"""What pruners share: levels that step by the same number of weights in every unit, and their payloads."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.base import LevelPlan, Payload
from evosweep.compressors.formats import bitmask
from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import SettingError

STEPS_IN_SMALLEST = 4


class SparseLevels:
    """A ladder of sparsities around one.

    All units step by the same number of weights, so that one unit's step down pays for another's step up exactly
    (EvoPress, arXiv 2410.14649, section 4).

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit, so that it has levels too.
    """

    def __init__(self, *, sparsity: float, window: float, step: int | None) -> None:
        self.sparsity = check_number("compressor.sparsity", sparsity, low=0, high=1)
        self.window = check_number("compressor.window", window, low=0, high=1)
        self.step = None if step is None else check_int("compressor.step", step, low=1)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelPlan]]:
        """Return the ladder of every unit, densest last, named by sparsity: ``62.5%``.

        Raises:
            SettingError: No level is left in a unit.
        """
        numels = {name: rows * columns for name, (rows, columns) in shapes.items()}
        step = self.step or max(1, min(numels.values()) // STEPS_IN_SMALLEST)
        return {name: self._ladder(name, numel, step) for name, numel in numels.items()}

    def _ladder(self, name: str, numel: int, step: int) -> list[LevelPlan]:
        middle = numel - round(self.sparsity * numel / step) * step
        reach = int(self.window * numel / step)
        kept = [middle + place * step for place in range(-reach, reach + 1)]
        kept = [count for count in kept if 0 < count <= numel]
        if not kept:
            raise SettingError(
                "compressor.step", allowed=f"small enough for {name}, which has {numel} weights", got=step
            )
        return [
            LevelPlan(
                name=f"{100 * (1 - count / numel):.6g}%", cost=bitmask.bits(numel=numel, kept=count),
                value=1 - count / numel, kept=count,
            )
            for count in kept
        ]

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {"sparsity": self.sparsity, "window": self.window, "step": self.step}


def payload_of(weight: torch.Tensor, mask: torch.Tensor) -> Payload:
    """Pack a weight (rows, columns) of which ``mask`` is kept."""
    rows, columns = weight.shape
    meta = {"rows": rows, "columns": columns}
    parts = bitmask.encode(weight, mask)
    return Payload("bitmask", parts, meta, bitmask.decode(parts, meta))


def keep_largest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Return a mask of exactly the ``kept`` largest scores, whatever their ties; same shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(scores.flatten(), kept, sorted=False).indices] = True
    return mask.view(scores.shape)
