"""What every mixture of experts offers, however the model keeps its experts."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Key = tuple[str, int]
"""Name of the parameter that holds an expert's matrix, and the expert's index."""


@dataclass(frozen=True)
class Rows:
    """The rows of a population at the levels that they have of one expert's matrix.

    Attributes:
        levels: Level of each row, shape (rows,).
        weight: Weight (out, in) by level.
    """

    levels: npt.NDArray[np.int64]
    weight: Callable[[int], torch.Tensor]


class Seen(Protocol):
    """Signature of a function that is given the inputs of each expert's matrix."""

    def __call__(self, attribute: str, expert: int, inputs: torch.Tensor, *, routed: bool) -> None:
        """Take some inputs.

        Args:
            attribute: Name of the parameter that holds the matrix, or path of the layer in the expert.
            expert: Index of the expert.
            inputs: Shape (some tokens, in).
            routed: Whether the router sent them to this expert.
        """


def every_so_many(tokens: torch.Tensor, *, passed: int, every: int) -> torch.Tensor:
    """Return the indices of the tokens of a batch that all experts are shown.

    Args:
        tokens: Of the batch, shape (tokens, hidden).
        passed: Number of tokens before them.
        every: How many tokens lie between two that all experts are shown.
    """
    first = min(-passed % every, len(tokens))
    return torch.arange(first, len(tokens), every, device=tokens.device)


class Routed(Protocol):
    """A mixture of experts, however the model keeps them.

    Attributes:
        module: The module that tokens and what the router says of them go into, or that routes itself.
    """

    @property
    def module(self) -> nn.Module: ...

    def by_row(self, rows: Mapping[Key, Rows]) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch meets the experts' weights of its own levels."""

    def watched(self, seen: Seen, *, every: int) -> AbstractContextManager[None]:
        """Return a context in which ``seen`` is shown what each matrix is given; arguments: ``watched_experts``."""
