"""Mixtures whose experts are modules in a list: runs the rows of a population, and shows what each expert is given.

The module around the list routes tokens as it likes, so that nobody outside knows which token an expert is given. So
rows that have the same levels of everything inside of that module run through it together, and each group of rows by
itself: a row runs once, whatever the routing does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from evosweep.models.device import moved
from evosweep.models.mixture import Key, Rows, Seen
from evosweep.models.patch import replaced_forward

Tree = Any  # tensors in tuples, lists and dicts


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
        named = {self.experts[expert].get_submodule(path): found for (path, expert), found in rows.items()}
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
        chosen = torch.arange(-self.passed % self.every, len(plain), self.every, device=plain.device)
        self.passed += len(plain)
        if not len(chosen):
            return
        self.routed = False
        for expert in self.mixture.experts:
            expert(plain[chosen])
        self.routed = True


@contextmanager
def in_groups(module: nn.Module, rows: Mapping[nn.Module, Rows]) -> Iterator[None]:
    """Run rows of a batch through a module in groups of equal levels of linear layers in it while the context lasts.

    Contexts of different layers of one module may be nested.

    Args:
        module: The module.
        rows: Levels of the rows by linear layer; one that is not there stays as it is.
    """
    around = vars(module).get("forward")
    before = around if isinstance(around, _InGroups) else _InGroups(module.forward, {})
    with replaced_forward(module, _InGroups(before.own, {**before.rows, **rows})):
        yield


@dataclass(frozen=True)
class _InGroups:
    """The forward of a module that runs groups of rows one after the other.

    Attributes:
        own: The module's own forward.
        rows: Levels of the rows by linear layer.
    """

    own: Callable[..., Tree]
    rows: Mapping[nn.Module, Rows]

    def __call__(self, *args: Any, **keywords: Any) -> Tree:
        """Return what the module returns, each row at its own levels."""
        table = np.stack([rows.levels for rows in self.rows.values()])
        count = table.shape[1]
        different, which = np.unique(table, axis=1, return_inverse=True)
        if different.shape[1] == 1:
            return self._at(different[:, 0].tolist(), args, keywords)
        states = first_tensor((args, keywords))
        lengths = {len(states), states.shape[:-1].numel()}
        parts = []
        order = []
        for group in range(different.shape[1]):
            members = np.flatnonzero(which.reshape(-1) == group)
            order.append(members)
            pick = partial(_picked, members=moved(members, states.device), rows=count, lengths=lengths)
            given = mapped(pick, args)
            named = mapped(pick, keywords)
            parts.append(self._at(different[:, group].tolist(), given, named))
        back = moved(np.argsort(np.concatenate(order)), states.device)
        return _joined(parts, [len(members) for members in order], back)

    def _at(self, levels: Sequence[int], args: Any, keywords: Any) -> Tree:
        """Return what the module returns where all rows have the same levels.

        Args:
            levels: Of each linear layer.
            args: Of the module.
            keywords: Of the module.
        """
        with ExitStack() as stack:
            for (layer, rows), level in zip(self.rows.items(), levels, strict=True):
                stack.enter_context(replaced_forward(layer, partial(_linear, layer, rows, level)))
            return self.own(*args, **keywords)


def _linear(layer: nn.Module, rows: Rows, level: int, inputs: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's output with its weight of a level, which is decoded only where the layer is given tokens.

    Args:
        layer: The layer.
        rows: Has the weights.
        level: Which one.
        inputs: Shape (..., in).
    """
    bias: Any = layer.bias
    if not inputs.numel():
        return inputs.new_zeros((*inputs.shape[:-1], layer.out_features))  # type: ignore[arg-type]
    return functional.linear(inputs, rows.weight(level), None if bias is None else bias.to(inputs.device))


def _picked(tensor: torch.Tensor, *, members: torch.Tensor, rows: int, lengths: set[int]) -> torch.Tensor:
    """Return some rows of a tensor whose first axis is that of the batch; another one as it is.

    Args:
        tensor: The tensor.
        members: Indices of the rows.
        rows: Number of rows.
        lengths: First axes that are that of the batch: sequences, or tokens.
    """
    if tensor.ndim == 0 or len(tensor) not in lengths:
        return tensor
    return tensor.unflatten(0, (rows, -1))[members].flatten(0, 1)


def _joined(parts: Sequence[Tree], sizes: Sequence[int], back: torch.Tensor) -> Tree:
    """Return what a module returned for groups of rows as one, the rows in their order.

    Args:
        parts: What it returned.
        sizes: Rows of each group.
        back: Position of each row among those of all groups.
    """
    first = parts[0]
    if isinstance(first, torch.Tensor):
        rows = torch.cat([part.unflatten(0, (size, -1)) for part, size in zip(parts, sizes, strict=True)])
        return rows[back].flatten(0, 1)
    if isinstance(first, tuple | list):
        return type(first)(_joined(values, sizes, back) for values in zip(*parts, strict=True))
    return first


def mapped(change: Callable[[torch.Tensor], torch.Tensor], tree: Tree) -> Tree:
    """Return a tree with its tensors changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(change, value) for value in tree)
    return {key: mapped(change, value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def first_tensor(tree: Tree) -> torch.Tensor:
    """Return the first tensor in a tree: of a module's arguments, the hidden states."""
    found: list[torch.Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return found[0]
