"""Replacements for a module's forward or a slot's weight, undone when their context ends."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class _Slot(Protocol):
    """A weight with a name that can be read and written; slots.Slot is one."""

    @property
    def name(self) -> str: ...

    def read(self) -> torch.Tensor: ...

    def write(self, weight: torch.Tensor) -> None: ...


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.forward`` by ``forward`` while the context lasts."""
    before = vars(module).get("forward")  # perhaps a replacement already
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def replaced_parameter(module: nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """Let a module, and no other that shares the parameter, use another tensor while the context lasts.

    Args:
        module: The module.
        name: Of its own parameter.
        value: What it uses instead; not copied.
    """
    before = module._parameters[name]
    module._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = before


@contextmanager
def replaced_weights(slots: Sequence[_Slot], weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Overwrite the weights of some slots while the context lasts; yield those they had before, by name.

    Args:
        slots: The slots.
        weights: Weight (out, in) of each, by its name.
    """
    dense = {slot.name: slot.read().clone() for slot in slots}
    try:
        for slot in slots:
            slot.write(weights[slot.name])
        yield dense
    finally:
        for slot in slots:
            slot.write(dense[slot.name])


@contextmanager
def replaced_parameters(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Overwrite some parameters of a model, by name, while the context lasts."""
    parameters = {name: model.get_parameter(name) for name in values}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _overwrite(parameters, values)
        yield
    finally:
        _overwrite(parameters, before)


@torch.no_grad()
def _overwrite(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
