"""The second moment of an input, mean of w·x xᵀ: the Hessian of a layer's output error."""

import torch

from evosweep.models.device import tf32
from evosweep.store.statistics.base import InputBatch, mean_over_tokens

COLUMNS_AT_ONCE = {"cpu": 192}  # columns of the symmetric matrix that are calculated at a time, down to the diagonal


class Measurement:
    """Sums w·x xᵀ in fp32, on and above the diagonal.

    Args:
        columns: Width of the input.
        device: Device of its batches.
    """

    def __init__(self, *, columns: int, device: torch.device) -> None:
        self.total = torch.zeros((columns, columns), device=device)
        self.tokens = 0

    def add(self, batch: InputBatch) -> None:
        """Add the tokens of one batch to the statistic."""
        rows = batch.weighted_rows
        self.tokens += len(rows)
        width = rows.shape[1]
        step = COLUMNS_AT_ONCE.get(rows.device.type, width)
        with tf32(allowed=True):  # both factors are rounded alike, so that the sum stays positive definite
            for start in range(0, width, step):
                columns = slice(start, min(start + step, width))
                self.total[: columns.stop, columns].addmm_(rows[:, : columns.stop].T, rows[:, columns])

    def finish(self) -> torch.Tensor:
        """Return the mean over the tokens of all processes, the whole matrix, shape (in, in)."""
        mean = mean_over_tokens(self.total, self.tokens)
        return mean.triu() + mean.triu(1).T
