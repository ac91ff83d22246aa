"""Slots: where in a model the weight of a unit is kept, how it is read, overwritten, and applied row by row."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from evosweep.core.errors import ModelError
from evosweep.models.patch import replaced_forward, replaced_parameter


@dataclass(frozen=True)
class RowGroups:
    """The rows of a population, grouped by the level that each has of one unit.

    Attributes:
        levels: The levels that occur.
        members: Row indices of each level, on the model's device.
        main: Index in ``levels`` of the level that most rows have.
        rows: Number of rows.
        cover: Whether all rows are multiplied with the main level's weight first and the others overwritten.
    """

    levels: list[int]
    members: Sequence[torch.Tensor]
    main: int
    rows: int
    cover: bool


class Slot(Protocol):
    """A weight matrix of shape (out, in) inside a model, however the model lays it out.

    Attributes:
        name: Path in the model.
        block: Index of the decoder block that holds it.
        group: Name of the first slot that is given the very same input tensor (its own, if there is no other).
        layout: ``linear`` for (out, in) as nn.Linear keeps it, ``transposed``, or ``expert``.
    """

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int: ...

    @property
    def group(self) -> str: ...

    @property
    def layout(self) -> str: ...

    @property
    def module(self) -> nn.Module:
        """The module whose forward uses the weight."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, perhaps among others."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the (out, in) view of a tensor laid out as ``parameter``: the parameter itself, or its gradient."""

    def read(self) -> torch.Tensor:
        """Return the weight as an (out, in) view of the parameter."""

    def write(self, weight: torch.Tensor) -> None:
        """Overwrite the weight with (out, in) values."""

    def path_at(self, module: str) -> str:
        """Return the slot's path in a model that has the slot's module at ``module``."""

    def forward_by_row(self, groups: RowGroups, weights: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
        """Return a context in which each row of the batch is multiplied with the weight of its own level.

        Args:
            groups: Which rows are at which level; the batch holds equally many sequences a row.
            weights: Weight (out, in) of each level in ``groups``.
        """

    def watch_inputs(self, callback: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Call ``callback`` with every input (..., in) that the weight is about to be multiplied with."""


@dataclass(frozen=True)
class LinearSlot:
    """The weight of an nn.Linear."""

    name: str
    block: int
    module: nn.Module
    group: str
    layout = "linear"

    @property
    def parameter(self) -> nn.Parameter:
        """The module's weight."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.read().shape
        return int(rows), int(columns)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the (out, in) view of a tensor laid out as ``parameter``."""
        return tensor

    def read(self) -> torch.Tensor:
        """Return the weight as an (out, in) view of the parameter."""
        return self.view(self.parameter)

    def write(self, weight: torch.Tensor) -> None:
        """Overwrite the weight with (out, in) values."""
        with torch.no_grad():
            self.read().copy_(weight)

    def path_at(self, module: str) -> str:
        """Return the slot's path in a model that has the slot's module at ``module``."""
        return module

    def forward_by_row(self, groups: RowGroups, weights: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
        """Return a context in which each row of the batch is multiplied with the weight of its own level."""
        bias: Any = self.module.bias
        return replaced_forward(self.module, linear_by_row(bias, groups, weights))

    def watch_inputs(self, callback: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Call ``callback`` with every input (..., in) of the module."""
        return self.module.register_forward_pre_hook(lambda _module, args: callback(args[0]))


@dataclass(frozen=True)
class TransposedSlot(LinearSlot):
    """The weight of a layer that keeps it as (in, out): GPT-2's Conv1D."""

    layout = "transposed"

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the (out, in) view of a tensor laid out as ``parameter``."""
        return tensor.T


@dataclass(frozen=True)
class OuterSlot(LinearSlot):
    """The matrix (vocabulary, hidden) of a model's embedding or head, outside of the blocks.

    Attributes:
        tied: Whether one tensor is both, so that this slot serves as both.
    """

    tied: bool = False

    def with_weight(self, weight: torch.Tensor) -> AbstractContextManager[None]:
        """Return a context in which this module uses another matrix; one that is tied to it does not."""
        return replaced_parameter(self.module, "weight", weight)

    def forward_by_row(self, groups: RowGroups, weights: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
        """Raise ModelError: a population is embedded, and goes through the head, level by level."""
        raise ModelError(f"{self.name}: the rows of a population are grouped by its level before it runs")


@dataclass(frozen=True)
class EmbeddingSlot(OuterSlot):
    """The token embedding; its rows are looked up."""

    layout = "embedding"


@dataclass(frozen=True)
class HeadSlot(OuterSlot):
    """The output matrix, where it is not the embedding's tensor."""

    layout = "head"


def outer_slots(model: Any, blocks: int) -> dict[str, OuterSlot]:
    """Return the slots of a model's ``embedding`` and ``head``; no head where both are one tensor.

    Args:
        model: A causal language model of transformers.
        blocks: Number of its blocks; the embedding is in block -1, the head in the one after the last.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    name = paths[id(embedding)]
    tied = head is not None and head.weight is embedding.weight
    found: dict[str, OuterSlot] = {"embedding": EmbeddingSlot(name, -1, embedding, name, tied)}
    if head is not None and not tied:
        path = paths[id(head)]
        found["head"] = HeadSlot(path, blocks, head, path)
    return found


SLOTS: Mapping[type[nn.Module], type[LinearSlot]] = {nn.Linear: LinearSlot, Conv1D: TransposedSlot}
"""Which slot the weight of a module is, by the module's class."""


def slot_kind(module: nn.Module) -> type[LinearSlot] | None:
    """Return the class of slot that a module's weight is, None where there is none for it."""
    return next((slot for kind, slot in SLOTS.items() if isinstance(module, kind)), None)


def linear_by_row(
    bias: torch.Tensor | None, groups: RowGroups, weights: Mapping[int, torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a linear layer's forward that multiplies each row of the batch with the weight of its own level.

    Args:
        bias: Bias (out,), the same for all rows.
        groups: Which rows are at which level.
        weights: Weight (out, in) of each level in ``groups``.
    """
    main = groups.levels[groups.main]
    if len(groups.levels) == 1:
        return lambda inputs: functional.linear(inputs, weights[main], bias)
    rest = [
        (level, rows)
        for index, (level, rows) in enumerate(zip(groups.levels, groups.members, strict=True))
        if index != groups.main or not groups.cover
    ]

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        by_row = inputs.reshape(groups.rows, -1, inputs.shape[-1])  # some models hand over a transposed view
        if groups.cover:
            outputs = functional.linear(by_row, weights[main], bias)
        else:
            outputs = by_row.new_empty((*by_row.shape[:-1], len(weights[main])))
        for level, rows in rest:
            outputs.index_copy_(0, rows, functional.linear(by_row.index_select(0, rows), weights[level], bias))
        return outputs.view(*inputs.shape[:-1], -1)

    return forward
