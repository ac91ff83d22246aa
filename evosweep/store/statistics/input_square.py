"""The mean of x_j², every token counted once: OWL's ‖X_j‖₂² over the number of tokens."""

from evosweep.store.statistics.base import InputBatch, MeanOfColumns


class Measurement(MeanOfColumns):
    """Sums x_j² in fp32."""

    def add(self, batch: InputBatch) -> None:
        """Add the tokens of one batch to the statistic."""
        self.total += batch.squares.sum(dim=0)
        self.tokens += len(batch.rows)
