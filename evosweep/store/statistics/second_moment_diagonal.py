"""The diagonal of the second moment, mean of w·x_j², for compressors that do not need the whole matrix."""

import torch

from evosweep.store.statistics.base import InputBatch, mean_over_tokens


class Measurement:
    """Sums w·x_j² in fp32.

    Args:
        columns: Width of the input.
        device: Device of its batches.
    """

    def __init__(self, *, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, batch: InputBatch) -> None:
        """Count one batch."""
        rows = batch.weighted_rows
        self.total += rows.square().sum(dim=0)
        self.tokens += len(rows)

    def finish(self) -> torch.Tensor:
        """Return the mean over the tokens of all processes, shape (in,)."""
        return mean_over_tokens(self.total, self.tokens)
