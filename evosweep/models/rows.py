"""Forwards in which each row of a population is treated on its own: by its own weight, or left out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.models.patch import replaced_forward, replaced_parameter
from evosweep.models.slots import LinearSlot, RowGroups, slot_kind


@dataclass(frozen=True)
class OwnForwardSlot(LinearSlot):
    """The weight of a linear layer whose class has a forward of its own.

    Falcon rounds before it adds the bias, DeepSeek-V4 multiplies groups of heads with a part of the matrix each.
    """

    def forward_by_row(self, groups: RowGroups, weights: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
        """Return a context in which each row of the batch goes through the layer with the weight of its own level."""
        return replaced_forward(self.module, own_forward_by_row(self.module, groups, weights))


def slot_kind_of(module: nn.Module) -> type[LinearSlot] | None:
    """Return the class of slot that a module's weight is, by its forward, too; None where there is none for it."""
    kind = slot_kind(module)
    return OwnForwardSlot if kind is LinearSlot and type(module).forward is not nn.Linear.forward else kind


def own_forward_by_row(
    module: nn.Module, groups: RowGroups, weights: Mapping[int, torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Return a forward that runs a module's own one for each level, with that level's weight, on its rows.

    Args:
        module: An embedding, or a linear layer that does more than multiply.
        groups: Which rows are at which level; the first axis of the input holds equally many sequences a row.
        weights: Value of the module's parameter ``weight`` at each level in ``groups``.
    """
    own = module.forward

    def forward(inputs: torch.Tensor, *more: Any, **keywords: Any) -> torch.Tensor:
        def at(level: int, rows: torch.Tensor) -> torch.Tensor:
            with replaced_parameter(module, "weight", weights[level]):
                found: torch.Tensor = own(rows, *more, **keywords)
            return found

        if len(groups.levels) == 1:
            return at(groups.levels[0], inputs)
        by_row = inputs.reshape(groups.rows, -1, *inputs.shape[1:])
        parts = []
        for level, rows in zip(groups.levels, groups.members, strict=True):
            found = at(level, by_row.index_select(0, rows).flatten(0, 1))
            parts.append((rows, found.unflatten(0, (len(rows), -1))))
        outputs = parts[0][1].new_empty((groups.rows, *parts[0][1].shape[1:]))
        for rows, part in parts:
            outputs.index_copy_(0, rows, part)
        return outputs.flatten(0, 1)

    return forward


@contextmanager
def passed_by(block: nn.Module, gone: torch.Tensor, rows: int) -> Iterator[None]:
    """Let a block return its input for some rows of the population while the context lasts.

    Args:
        block: A decoder block.
        gone: Indices of these rows, on the model's device.
        rows: Number of rows; the batch holds equally many sequences a row.

    Raises:
        ModelError: The block returns more than hidden states of its input's shape.
    """
    own = block.forward

    def forward(*args: Any, **keywords: Any) -> Any:
        given = args[0] if args else keywords["hidden_states"]
        returned = own(*args, **keywords)
        first, *rest = returned if isinstance(returned, tuple | list) else (returned,)
        if first.shape != given.shape or any(value is not None for value in rest):
            raise ModelError(f"a {type(block).__name__} returns more than hidden states, so it cannot be dropped")
        mixed = first.unflatten(0, (rows, -1)).index_copy(
            0, gone, given.to(first.dtype).unflatten(0, (rows, -1)).index_select(0, gone)
        )
        mixed = mixed.flatten(0, 1)
        return type(returned)((mixed, *rest)) if isinstance(returned, tuple | list) else mixed

    with replaced_forward(block, forward):
        yield
