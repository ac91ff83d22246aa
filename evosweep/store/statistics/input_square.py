"""The mean of x_j², every token counted once: OWL's ‖X_j‖₂² over the number of tokens."""

import torch

from evosweep.store.statistics.base import InputBatch, mean_over_tokens


class Measurement:
    """Sums x_j² in fp32.

    Args:
        columns: Width of the input.
        device: Device of its batches.
    """

    def __init__(self, *, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, batch: InputBatch) -> None:
        """Count one batch."""
        self.total += batch.squares.sum(dim=0)
        self.tokens += len(batch.rows)

    def finish(self) -> torch.Tensor:
        """Return the mean over the tokens of all processes, shape (in,)."""
        return mean_over_tokens(self.total, self.tokens)
