"""Perplexity on the text itself."""

import math
from collections.abc import Mapping

import torch

from evosweep.fitness.base import Outputs


class Perplexity:
    """exp of the mean negative log-likelihood of the token that came next; the dense model is not needed."""

    name = "ppl"

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return an empty dict: the loss needs the text alone, not the dense model."""
        del dense
        return {}

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return −log p(next token) at every token, in nats, fp32, shape (tokens,).

        Args:
            outputs: The compressed model's output, which has the next tokens as ``labels``.
            targets: Not used.
        """
        del targets
        return outputs.logsumexp - outputs.label_logit

    def reduce(self, mean: float) -> float:
        """Return the perplexity exp(mean) of a mean in nats a token; infinity where that overflows."""
        try:
            return math.exp(mean)
        except OverflowError:
            return math.inf
