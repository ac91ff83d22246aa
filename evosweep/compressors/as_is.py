"""A layer as it is, in 16 bits: a level that lets a search leave it alone."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans
from evosweep.compressors.formats import plain
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import Statistics
from evosweep.core.unit import Nominal

WIDTH = 16


class AsIs:
    """Offers one level of 16 bits: bfloat16 where that holds every weight exactly, else fp16."""

    needs: frozenset[str] = frozenset()

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        """Return one level a unit, ``16bit``."""
        return {
            name: [LevelSpec(f"{WIDTH}bit", rows * columns * WIDTH, Nominal("bits", float(WIDTH)), None)]
            for name, (rows, columns) in shapes.items()
        }

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of the weights as they are.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: Not read.
            plans: What ``plan`` returned.
        """
        del statistics
        return {name: {plans[name][0].name: _payload(weight)} for name, weight in weights.items() if plans[name]}

    def describe(self) -> dict[str, Any]:
        """Return nothing: there are no settings."""
        return {}


def _payload(weight: torch.Tensor) -> Payload:
    short = weight.bfloat16()
    exact = bool((short.float() == weight).all())
    return Payload(plain.__name__, {"weight": short if exact else weight.half()})
