"""What a fitness is, and what several of them share: one pass over the output head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from evosweep.models.fused import logits_and_sum
from evosweep.models.head import Head

CHUNK_BYTES = {"cpu": 96e6, "cuda": 2e9}  # of whole rows of logits at once
PIECE_BYTES = {"cpu": 8e6, "cuda": 8e9}  # of logits of a piece of the vocabulary: in cache on a CPU


def rows_at_once(head: Head, tokens: int) -> int:
    """Return how many candidates of so many tokens go through the head together: more than one where logits fit."""
    device = head.weight.device.type
    whole = tokens * len(head.weight) * head.weight.element_size()
    return max(1, int(CHUNK_BYTES[device] / whole)) if device != "cpu" and head.linear else 1


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model says about some tokens.

    Attributes:
        head: The (shared, uncompressed) output head.
        hidden: Final hidden states, shape (tokens, hidden).
        labels: The tokens that came next, shape (tokens,).
        compiled: Whether the reduction over the vocabulary is compiled.
    """

    head: Head
    hidden: torch.Tensor
    labels: torch.Tensor
    compiled: bool = False

    def logits(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield fp32 logits (some tokens, vocabulary) and where they belong, never all at once."""
        step = max(1, int(CHUNK_BYTES[self.hidden.device.type] / (4 * len(self.head.weight))))
        for start in range(0, len(self.hidden), step):
            span = slice(start, min(start + step, len(self.hidden)))
            yield span, self.head.logits(self.hidden[span])

    @cached_property
    def logsumexp(self) -> torch.Tensor:
        """log Σ exp(logits), fp32, shape (tokens,)."""
        return self._head_pass[0]

    @cached_property
    def label_logit(self) -> torch.Tensor:
        """The logit of the token that came next, fp32, shape (tokens,)."""
        return self._head_pass[1]

    @cached_property
    def _head_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.head.linear:
            return self._linear_pass()
        total = torch.empty(len(self.hidden), device=self.hidden.device)
        label = torch.empty_like(total)
        for span, logits in self.logits():
            label[span] = logits.gather(1, self.labels[span, None])[:, 0]
            total[span] = torch.logsumexp(logits, dim=1)
        return total, label

    def _linear_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a linear head, piece by piece of the vocabulary: what is alive stays in cache."""
        step = max(1, int(PIECE_BYTES[self.hidden.device.type] / (4 * len(self.hidden))))
        sums, label = [], torch.empty(len(self.hidden), device=self.hidden.device)
        for start in range(0, len(self.head.weight), step):
            piece = self.head.piece(start, start + step)
            logits, total = logits_and_sum(self.hidden, piece.weight, piece.bias, compiled=self.compiled)
            sums.append(total)
            place = self.labels - start
            found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].float()
            label = torch.where((place >= 0) & (place < logits.shape[1]), found, label)
        return torch.stack(sums).logsumexp(dim=0), label


class Fitness(Protocol):
    """How far a compressed model is from the dense one; lower is better.

    Attributes:
        name: As in metrics: ``kl``, ``ppl``.
    """

    name: str

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return what must be remembered of the dense model, first dimension (tokens,)."""

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of every token, fp32, shape (tokens,)."""

    def reduce(self, mean: float) -> float:
        """Turn the mean loss into the figure that is reported."""
