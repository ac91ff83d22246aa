"""Perplexity on the text itself."""

import math
from collections.abc import Mapping

import torch

from evosweep.fitness.base import Outputs


class Perplexity:
    """exp of the mean negative log-likelihood of the token that came next; the dense model is not needed."""

    name = "ppl"

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return no tensors."""
        del dense
        return {}

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the negative log-likelihood of every token, in nats."""
        del targets
        return outputs.logsumexp - outputs.label_logit

    def reduce(self, mean: float) -> float:
        """Return exp(mean), infinite where it overflows."""
        try:
            return math.exp(mean)
        except OverflowError:
            return math.inf
