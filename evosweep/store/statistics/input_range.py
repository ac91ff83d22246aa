"""The largest magnitude of a shared input, over all its columns and tokens: for static scales of activations."""

import torch

from evosweep.parallel import all_reduce_max
from evosweep.store.statistics.base import InputBatch


class Measurement:
    """Keeps the largest |x|."""

    def __init__(self, *, columns: int, device: torch.device) -> None:
        del columns
        self.largest = torch.zeros((), device=device)

    def add(self, batch: InputBatch) -> None:
        """Add the tokens of one batch to the statistic."""
        self.largest = torch.maximum(self.largest, batch.rows.abs().amax())

    def finish(self) -> torch.Tensor:
        """Return the largest magnitude over all processes, a scalar."""
        all_reduce_max(self.largest)
        return self.largest
