"""A compressor that needs gradients, and a statistic of its own: what somebody else's package would add."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Payload, Plans, Statistics
from evosweep.compressors.formats import bitmask
from evosweep.compressors.sparse import SparseSpec, payload_of
from evosweep.core.unit import Nominal
from evosweep.store.statistics.base import InputBatch

LARGEST_INPUT = "tests.compressors.gradient_rows"


class GradientRows:
    """Keeps whole rows: those at whose outputs the loss's gradient is largest."""

    needs = frozenset({"output_gradient_square", LARGEST_INPUT})

    def __init__(self, *, kept: tuple[float, ...] = (0.5, 1.0)) -> None:
        self.kept = tuple(kept)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        return {name: [self._level(*shape, share) for share in self.kept] for name, shape in shapes.items()}

    def _level(self, rows: int, columns: int, share: float) -> LevelSpec:
        kept = int(rows * share) * columns
        sparsity = 1 - kept / (rows * columns)
        return LevelSpec(
            name=f"{share:.0%}",
            cost=bitmask.bits(numel=rows * columns, kept=kept),
            nominal=Nominal("sparsity", sparsity),
            spec=SparseSpec(kept),
            removed=sparsity,
        )

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        assert float(statistics.get(LARGEST_INPUT)) > 0
        return {
            name: {
                level.name: payload_of(weight, self._mask(weight, statistics.output_gradient_square[name], level.spec))
                for level in plans[name]
            }
            for name, weight in weights.items()
        }

    def _mask(self, weight: torch.Tensor, squares: torch.Tensor, spec: SparseSpec) -> torch.Tensor:
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[squares.topk(spec.kept // weight.shape[1]).indices] = True
        return mask

    def describe(self) -> dict[str, Any]:
        return {"kept": self.kept}


class Measurement:
    """The largest absolute input."""

    def __init__(self, *, columns: int, device: torch.device) -> None:
        self.largest = torch.zeros((), device=device)

    def add(self, batch: InputBatch) -> None:
        self.largest = torch.maximum(self.largest, batch.rows.abs().max())

    def finish(self) -> torch.Tensor:
        return self.largest
