"""No compression: for searches that only drop."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.base import Payload, Plans


class NoCompression:
    """Leaves every layer as it is, so that none is a unit."""

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        """Return no levels."""
        del shapes
        return {}

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return no payloads."""
        del weights, gram, plans
        return {}

    def describe(self) -> dict[str, Any]:
        """Return nothing: there are no settings."""
        return {}
