"""The protocol of a fitness, and the one pass over the output head that several of them share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Protocol

import torch

from evosweep.models.fused import head_kernel_for, logits_and_sum
from evosweep.models.head import Head

ROWS_BYTES = 4e9  # of fp32 logits, or of copies of hidden states, of several candidates at once, on CUDA
COPIES = 4  # of hidden states in fp32 that a fitness makes
CHUNK_BYTES = {"cpu": 96e6, "cuda": 2e9}  # of fp32 logits of some tokens, copies of which are made
PIECE_BYTES = {"cpu": 8e6, "cuda": 8e9}  # of fp32 logits of a piece of the vocabulary: in cache on a CPU


def rows_at_once(head: Head, tokens: int, *, compiled: bool) -> int:
    """Return how many candidates go through the head together: on CUDA as many as fit.

    Args:
        head: The output head.
        tokens: Of a candidate.
        compiled: Whether the head may be one compiled kernel.
    """
    if head.weight.device.type == "cpu" or not head.linear:
        return 1
    vocabulary, hidden = head.weight.shape
    stored = vocabulary if _kernel(head, head.weight, compiled=compiled) is None else COPIES * hidden
    return max(1, int(ROWS_BYTES / (4 * tokens * stored)))


def _kernel(head: Head, hidden: torch.Tensor, *, compiled: bool) -> ModuleType | None:
    """Return the kernels that compute a head's sums without logits, or None where logits must be stored."""
    usable = compiled and head.linear and hidden.dtype is head.weight.dtype
    return head_kernel_for(hidden) if usable else None


@dataclass(frozen=True, eq=False)
class Outputs:
    """The output of a model on some tokens, from which any fitness is computed.

    Attributes:
        head: The (shared, uncompressed) output head.
        hidden: Final hidden states, shape (tokens, hidden).
        labels: The tokens that came next, shape (tokens,).
        compiled: Whether the reduction over the vocabulary is compiled, on a GPU as one kernel with the head's product.
        other: The head that the other model has, where it is not the same one: the compressed model's in ``targets``,
            the dense model's in ``losses``.
    """

    head: Head
    hidden: torch.Tensor
    labels: torch.Tensor
    compiled: bool = False
    other: Head | None = None

    def logits(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of the tokens, with the fp32 logits (some tokens, vocabulary) of each, never all at once."""
        step = max(1, int(CHUNK_BYTES[self.hidden.device.type] / (4 * len(self.head.weight))))
        for start in range(0, len(self.hidden), step):
            span = slice(start, min(start + step, len(self.hidden)))
            yield span, self.head.logits(self.hidden[span])

    @cached_property
    def logsumexp(self) -> torch.Tensor:
        """log Σ exp(logits), fp32, shape (tokens,)."""
        kernel = _kernel(self.head, self.hidden, compiled=self.compiled)
        if kernel is None:
            return self._head_pass[0]
        total: torch.Tensor = kernel.logsumexp(self.hidden, self.head.weight, self.head.bias)
        return total

    @cached_property
    def label_logit(self) -> torch.Tensor:
        """The logit of the token that came next, fp32, shape (tokens,)."""
        kernel = _kernel(self.head, self.hidden, compiled=self.compiled)
        if kernel is None:
            return self._head_pass[1]
        label: torch.Tensor = kernel.label_logits(self.hidden, self.head.weight, self.head.bias, self.labels)
        return label

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
        """Return the same for a linear head, by pieces of the vocabulary, so that logits stay in cache."""
        step = max(1, int(PIECE_BYTES[self.hidden.device.type] / (4 * len(self.hidden))))
        sums = []
        label = torch.empty(len(self.hidden), device=self.hidden.device)
        for start in range(0, len(self.head.weight), step):
            piece = self.head.piece(start, start + step)
            logits, total = logits_and_sum(self.hidden, piece.weight, piece.bias, compiled=self.compiled)
            sums.append(total)
            column = self.labels - start
            found = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            label = torch.where((column >= 0) & (column < logits.shape[1]), found, label)
        return torch.stack(sums).logsumexp(dim=0), label


class Fitness(Protocol):
    """A measure of how far a compressed model is from the dense one, lower is better.

    Attributes:
        name: As in metrics: ``kl``, ``ppl``.
    """

    name: str

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return the tensors that ``losses`` needs of the dense model, each with first dimension tokens."""

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of every token, fp32, shape (tokens,).

        Args:
            outputs: The compressed model's output.
            targets: What ``targets`` returned for the same tokens.
        """

    def reduce(self, mean: float) -> float:
        """Return the figure that is reported and minimized, for the mean of ``losses`` over all tokens.

        The KL is that mean itself, perplexity its exponential.
        """
