"""Stand-ins for a module's forward or weight, taken back whatever happens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class _Site(Protocol):
    """A layer with a name; anatomy.Site is one."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> torch.Tensor: ...

    def set_weight(self, weight: torch.Tensor) -> None: ...


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` stand in for ``module.forward``."""
    before = vars(module).get("forward")  # a stand-in already, perhaps
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def replaced_weights(sites: Sequence[_Site], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give layers other weights for a while.

    Args:
        sites: The layers.
        weights: Weight (out, in) of each, by unit name.
    """
    dense = {site.name: site.weight.clone() for site in sites}
    try:
        for site in sites:
            site.set_weight(weights[site.name])
        yield
    finally:
        for site in sites:
            site.set_weight(dense[site.name])


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Let a module that returns one tensor return zeros."""
    forward = module.forward
    with replaced_forward(module, lambda *args, **kwargs: torch.zeros_like(forward(*args, **kwargs))):
        yield
