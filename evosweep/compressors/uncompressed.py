"""No compression, for searches that only drop blocks or modules."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import Statistics


class NoCompression:
    """A compressor without levels: no layer becomes a unit."""

    needs: frozenset[str] = frozenset()

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        """Return no levels."""
        del shapes
        return {}

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return no payloads.

        Args:
            weights: Not read.
            statistics: Not read.
            plans: Not read.
        """
        del weights, statistics, plans
        return {}

    def describe(self) -> dict[str, Any]:
        """Return nothing: there are no settings."""
        return {}
