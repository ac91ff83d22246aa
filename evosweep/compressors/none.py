"""No compression: for searches that only drop."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import Statistics


class NoCompression:
    """Leaves every layer as it is, so that none is a unit."""

    needs: frozenset[str] = frozenset()

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        """Return no levels."""
        del shapes
        return {}

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return no payloads."""
        del weights, statistics, plans
        return {}

    def describe(self) -> dict[str, Any]:
        """Return nothing: there are no settings."""
        return {}
