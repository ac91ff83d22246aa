"""What blocks are given beside hidden states, recorded while tokens are embedded and fitted to the batch that runs.

Two recordings, of one window and of two others, show what depends on what: positions and masks are the same for every
window, some of them once for each row of the batch (alibi: once for each head of each row), others follow from the
tokens (the per-layer inputs of Gemma 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evosweep.core.errors import ModelError
from evosweep.core.seeds import generator

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Record = Callable[[torch.Tensor], list[Arguments]]


@dataclass(frozen=True)
class Part:
    """How one tensor among a block's arguments follows from the batch.

    Attributes:
        axis: The axis that grows with the batch; None: no axis does.
        by_window: Whether its values follow from the tokens.
    """

    axis: int | None = None
    by_window: bool = False

    def fitted(self, value: Any, times: int) -> Any:
        """Return the tensor for a batch of so many times the rows that it was recorded with."""
        if self.axis is None or times == 1:
            return value
        if value.shape[self.axis] == 1:
            return value.expand(*(times if axis == self.axis else -1 for axis in range(value.dim())))
        return torch.cat([value] * times, dim=self.axis)


@dataclass(frozen=True)
class Recorded:
    """The arguments of one block, taken apart.

    Attributes:
        values: Tensors and other values.
        spec: How they are put together again.
        parts: How each follows from the batch.
    """

    values: list[Any]
    spec: pytree.TreeSpec
    parts: list[Part]

    def fitted(self, times: int) -> Arguments:
        """Return the arguments for a batch of so many times the rows that they were recorded with."""
        fitted = [part.fitted(value, times) for part, value in zip(self.parts, self.values, strict=True)]
        arguments: Arguments = pytree.tree_unflatten(fitted, self.spec)
        return arguments


class Contexts:
    """The further arguments of every block, for windows of any length.

    Args:
        record: Returns every block's arguments without hidden states, for token ids (batch, seq_len).
        vocabulary: Number of token ids.
        device: Where token ids belong.
        sees: Whether some windows (windows, seq_len) hold an image, whose values no other window's stand for.
    """

    def __init__(
        self, record: Record, *, vocabulary: int, device: torch.device, sees: Callable[[torch.Tensor], bool]
    ) -> None:
        self._record = record
        self._sees = sees
        self._vocabulary = vocabulary
        self._device = device
        self._same: dict[int, list[Recorded]] = {}
        self._seeing: list[Recorded] | None = None
        self._last: tuple[torch.Tensor, list[Recorded]] | None = None

    def by_window(self, seq_len: int) -> bool:
        """Return whether blocks are given something that follows from the tokens."""
        return any(part.by_window for block in self._of_length(seq_len) for part in block.parts)

    def of(self, block: int, shape: torch.Size, tokens: torch.Tensor | None) -> Arguments:
        """Return the further arguments of a block.

        Args:
            block: Its index.
            shape: Of the hidden states, (batch, seq_len, hidden).
            tokens: Token ids (windows, seq_len) of the batch, which holds them once for each row of a population.

        Raises:
            ModelError: The arguments follow from the tokens, and these are not given; or they follow from the batch
                in a way that is not known.
        """
        if tokens is not None and self._sees(tokens):
            return self._of_images(tokens)[block].fitted(shape[0] // len(tokens))
        recorded = self._of_length(shape[1])
        if any(part.by_window for part in recorded[block].parts):
            if tokens is None:
                raise ModelError("the blocks of this model are given values of every token, which this step lacks")
            return self._of_tokens(tokens, recorded)[block].fitted(shape[0] // len(tokens))
        return recorded[block].fitted(shape[0])

    def prepare(self, seq_len: int, tokens: torch.Tensor | None) -> None:
        """Record the arguments for windows of a length, and for some windows.

        Args:
            seq_len: The length.
            tokens: Token ids (windows, seq_len).
        """
        if tokens is not None and self._sees(tokens):
            self._of_images(tokens)
        elif self.by_window(seq_len) and tokens is not None:
            self._of_tokens(tokens, self._of_length(seq_len))

    def forget(self) -> None:
        """Let everything be recorded anew."""
        self._same.clear()
        self._seeing = None
        self._last = None

    def _of_length(self, seq_len: int) -> list[Recorded]:
        if seq_len not in self._same:
            draws = generator(0, "block contexts", seq_len).integers(self._vocabulary, size=(3, seq_len))
            tokens = torch.from_numpy(draws).to(self._device)
            one = self._record(tokens[:1])
            two = self._record(tokens[1:])
            self._same[seq_len] = [_compared(*pair) for pair in zip(one, two, strict=True)]
        return self._same[seq_len]

    def _of_images(self, tokens: torch.Tensor) -> list[Recorded]:
        """Return every block's arguments for windows that hold an image, which are recorded for them."""
        if self._seeing is None:  # a window beside itself shows which axis grows
            one = self._record(tokens[:1])
            two = self._record(tokens[:1].repeat(2, 1))
            self._seeing = [_compared(*pair) for pair in zip(one, two, strict=True)]
        return self._of_tokens(tokens, self._seeing)

    def _of_tokens(self, tokens: torch.Tensor, recorded: list[Recorded]) -> list[Recorded]:
        """Return every block's arguments for some windows; those of the last windows are kept."""
        if self._last is None or self._last[0] is not tokens:
            found = []
            for arguments, known in zip(self._record(tokens), recorded, strict=True):
                found.append(Recorded(pytree.tree_flatten(arguments)[0], known.spec, known.parts))
            self._last = tokens, found
        return self._last[1]


def _compared(one: Arguments, two: Arguments) -> Recorded:
    """Return a block's arguments for one window, compared with those for two others."""
    values, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(two)
    if spec != other_spec:
        raise ModelError("its blocks are given other arguments for two windows than for one")
    return Recorded(values, spec, [_part(*pair) for pair in zip(values, others, strict=True)])


def _part(one: Any, two: Any) -> Part:
    """Return how a value for one window follows from the batch, given that for two others."""
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        if one is two or (type(one) is type(two) and one == two):
            return Part()
        raise ModelError(f"its blocks are given a {type(one).__name__} that follows from the batch")
    if one.shape == two.shape:
        if torch.equal(one, two):
            return Part()
        raise ModelError("its blocks are given a tensor that mixes the windows of a batch")
    grown = [axis for axis, (size, other) in enumerate(zip(one.shape, two.shape, strict=True)) if size != other]
    if len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise ModelError("its blocks are given a tensor that grows in more ways than with the batch")
    halves = two.chunk(2, dim=grown[0])
    return Part(grown[0], by_window=not all(torch.equal(half, one) for half in halves))
