"""Images in token windows: ids that stand for their tokens, and what a model is given beside the ids.

A window holds, in place of every token of an image, an id from ``FIRST`` on that is a hash of the image as the model's
processor prepares it and of the window's text. So a window of ids says by itself which image belongs to it, wherever
it is passed, and the hash of a split covers its images.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evosweep.core.errors import ModelError

FIRST = 2**62  # no vocabulary is so large
DIGEST = 7  # bytes of a hash that an id has room for
IGNORED = -100  # the label that torch's cross_entropy ignores


@dataclass(frozen=True)
class Pictures:
    """The images of windows.

    Attributes:
        placeholder: Token id that stands for a token of an image where the model is given an image beside the ids.
        seq_len: Tokens of a window.
        inputs: What a model is given beside the ids of one window, by the id of its image and by the argument's name;
            the first axis of every tensor grows with the batch.
    """

    placeholder: int = 0
    seq_len: int = 0
    inputs: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def __or__(self, other: "Pictures") -> "Pictures":
        """Return the images of both."""
        known = self if self.inputs else other
        return Pictures(known.placeholder, known.seq_len, {**self.inputs, **other.inputs})

    def in_any(self, tokens: torch.Tensor) -> bool:
        """Return whether one of some windows holds an image."""
        return bool(self.inputs) and bool((tokens >= FIRST).any())

    def plain(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return token ids with the placeholder in place of images."""
        return tokens.masked_fill(tokens >= FIRST, self.placeholder) if self.inputs else tokens

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return token ids as labels of a cross-entropy, which ignores those in place of images."""
        return tokens.masked_fill(tokens >= FIRST, IGNORED) if self.inputs else tokens

    def arguments(self, tokens: torch.Tensor, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a model's forward: ``input_ids``, and what its processor made of images.

        Args:
            tokens: Token ids (windows, seq_len).
            dtype: Type of the images' values.

        Raises:
            ModelError: Some windows hold an image and others none, or only the beginning of a window is given.
        """
        if not self.in_any(tokens):
            return {"input_ids": tokens}
        found = [self.inputs.get(key) for key in tokens.amax(dim=1).tolist()]
        given = [inputs for inputs in found if inputs is not None]
        if len(given) < len(found) or tokens.shape[1] != self.seq_len:
            raise ModelError("this step reads parts of windows, and a window with an image must be read whole")
        made = {"input_ids": self.plain(tokens)}
        for name in given[0]:
            value = _joined([inputs[name] for inputs in given]).to(tokens.device)
            made[name] = value.to(dtype) if value.is_floating_point() else value
        return made


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """Return tensors one after the other, filled up with zeros to one shape, as processors do with several images."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        short = [size - there for size, there in zip(largest, value.shape[1:], strict=True)]
        amounts = [amount for size in reversed(short) for amount in (0, size)]
        filled.append(torch.nn.functional.pad(value, amounts) if any(short) else value)
    return torch.cat(filled)


def named_by_content(
    ids: npt.NDArray[np.int64], inputs: Mapping[str, torch.Tensor], *, placeholder: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Return a window's ids with the image's id in place of its tokens, and that id.

    Args:
        ids: Token ids (seq_len,).
        inputs: What the processor made beside the ids.
        placeholder: Token id of images.
    """
    content = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    for name, value in sorted(inputs.items()):
        content.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        content.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    key = FIRST + int.from_bytes(content.digest()[:DIGEST], "big")
    return np.where(ids == placeholder, key, ids), key


def text_weights(windows: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.float32]:
    """Return the factor of the loss on each token, shape (windows, length - 1), so that a mean is one over text alone.

    What a model expects in place of an image's tokens says nothing, as it is never asked for them. A window's factors
    have mean one, or are zero where its first ``length`` tokens have no text.

    Args:
        windows: Token ids (windows, seq_len).
        length: Of how many tokens losses are known.
    """
    text = windows[:, 1:length] < FIRST
    counts = text.sum(axis=1, keepdims=True)
    factors: Any = np.where(text, (length - 1) / np.maximum(counts, 1), 0.0)
    return np.asarray(factors, dtype=np.float32)
