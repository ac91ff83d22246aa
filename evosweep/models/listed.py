"""Mixtures whose experts are modules in a list: runs the rows of a population, and shows what each expert is given.

The module around the list routes tokens as it likes, so that nobody outside knows which token an expert is given. So
rows that have the same levels of everything inside of that module run through it together, and each group of rows by
itself: a row runs once, whatever the routing does.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from evosweep.models.grouped_rows import first_tensor, in_groups
from evosweep.models.routing_types import Key, Rows, Seen, every_so_many


@dataclass(frozen=True, eq=False)
class ListedMixture:
    """A module that sends tokens to experts that are modules of their own.

    Attributes:
        name: Path of the module that routes: the list itself, where it has a forward, or the one around it.
        module: That module.
        paths: Paths of the experts.
        experts: The experts.
        layers: Paths of the linear layers in each of them.
        active: How many experts each token goes to.
    """

    name: str
    module: nn.Module
    paths: tuple[str, ...]
    experts: tuple[nn.Module, ...]
    layers: tuple[str, ...]
    active: int

    def by_row(self, rows: Mapping[Key, Rows]) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch meets the experts' weights of its own levels.

        Args:
            rows: Levels of the rows by path and index of the expert; a matrix that is not there stays as it is.
        """
        named = {
            (self.experts[expert].get_submodule(path), "weight", 0): found for (path, expert), found in rows.items()
        }
        return in_groups(self.module, named)

    @contextmanager
    def watched(self, seen: Seen, *, every: int) -> Iterator[None]:
        """Show what each expert's matrices are given while the context lasts; arguments as for ``watched_experts``."""
        watch = _Watch(self, seen, every)
        with ExitStack() as stack:
            for expert, module in enumerate(self.experts):
                for path in self.layers:
                    hook = partial(watch.given, path, expert)
                    stack.callback(module.get_submodule(path).register_forward_pre_hook(hook).remove)
            stack.callback(self.module.register_forward_pre_hook(watch.show, with_kwargs=True).remove)
            yield


@dataclass
class _Watch:
    """Shows what experts are given, and shows them every so many tokens of all.

    Attributes:
        mixture: The mixture.
        seen: Given the inputs of each matrix.
        every: How many tokens lie between two that all experts are shown.
        passed: Number of tokens so far.
        routed: Whether what runs now was sent by the router.
    """

    mixture: ListedMixture
    seen: Seen
    every: int
    passed: int = 0
    routed: bool = True

    def given(self, path: str, expert: int, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Pass on the input of one matrix, if it is given any token."""
        del module
        inputs = args[0].flatten(0, -2)
        if len(inputs):
            self.seen(path, expert, inputs, routed=self.routed)

    def show(self, module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Run every expert on some tokens of all; what it makes of them is thrown away."""
        del module
        plain = first_tensor((args, keywords)).flatten(0, -2)
        chosen = every_so_many(plain, passed=self.passed, every=self.every)
        self.passed += len(plain)
        if not len(chosen):
            return
        self.routed = False
        for expert in self.mixture.experts:
            expert(plain[chosen])
        self.routed = True
