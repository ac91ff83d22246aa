"""The diagonal of the second moment, mean of w·x_j², for compressors that do not need the whole matrix."""

from evosweep.store.statistics.base import InputBatch, MeanOfColumns


class Measurement(MeanOfColumns):
    """Sums w·x_j² in fp32."""

    def add(self, batch: InputBatch) -> None:
        """Add the tokens of one batch to the statistic."""
        rows = batch.weighted_rows
        self.total += rows.square().sum(dim=0)
        self.tokens += len(rows)
