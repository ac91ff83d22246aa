"""Runs the rows of a population through a module in groups of those that have the same levels of everything in it.

For modules that route tokens: nobody outside knows which rows the tokens come from that a layer in them is given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evosweep.models.device import moved
from evosweep.models.patch import replaced_forward
from evosweep.models.routing_types import Rows

Tree = Any  # tensors in tuples, lists and dicts
Part = tuple[nn.Module, str, int]
"""A module, the name of its parameter, and which of the matrices in that; 0 where it is one."""
Weights = Mapping[tuple[str, int], Callable[[], torch.Tensor]]
"""Functions that return matrices (out, in), by name of the parameter and which of the matrices in it."""


_RUNNING: ContextVar[npt.NDArray[np.int64] | None] = ContextVar("rows that run now, where not all do", default=None)


def among_running(rows: npt.NDArray[np.int64], count: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the positions of some rows among those that run now, and how many run.

    Args:
        rows: Indices of the rows.
        count: Number of all rows.
    """
    running = _RUNNING.get()
    return (rows, count) if running is None else (np.flatnonzero(np.isin(running, rows)), len(running))


@contextmanager
def in_groups(
    module: nn.Module,
    rows: Mapping[Part, Rows],
    replaced: Mapping[nn.Module, Callable[..., torch.Tensor]] | None = None,
) -> Iterator[None]:
    """Run rows of a batch through a module in groups of equal levels of matrices in it while the context lasts.

    Contexts of different matrices in one module may be nested.

    Args:
        module: The module.
        rows: Levels of the rows by matrix; one that is not there stays as it is.
        replaced: By module that is no linear layer, a forward that is given ``Weights``, then the module's arguments.
    """
    around = vars(module).get("forward")
    before = around if isinstance(around, _InGroups) else _InGroups(module.forward, {}, {})
    merged = _InGroups(before.own, {**before.rows, **rows}, {**before.replaced, **(replaced or {})})
    with ExitStack() as stack:
        for layer, _, _ in rows:  # so that the weights of blocks that visit the device are known not to be used
            stack.enter_context(replaced_forward(layer, layer.forward))
        stack.enter_context(replaced_forward(module, merged))
        yield


@dataclass(frozen=True)
class _InGroups:
    """The forward of a module that runs groups of rows one after the other.

    Attributes:
        own: The module's own forward.
        rows: Levels of the rows by matrix.
        replaced: As for ``in_groups``.
        keeps_weights: Whether the module's own weights are used all the same; see ``device.let_visit``.
    """

    own: Callable[..., Tree]
    rows: Mapping[Part, Rows]
    replaced: Mapping[nn.Module, Callable[..., torch.Tensor]]
    keeps_weights: bool = True

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
            token = _RUNNING.set(members)
            try:
                parts.append(self._at(different[:, group].tolist(), given, named))
            finally:
                _RUNNING.reset(token)
        back = moved(np.argsort(np.concatenate(order)), states.device)
        return _joined(parts, [len(members) for members in order], back)

    def _at(self, levels: Sequence[int], args: Any, keywords: Any) -> Tree:
        """Return what the module returns where all rows have the same levels.

        Args:
            levels: Of each matrix.
            args: Of the module.
            keywords: Of the module.
        """
        weights: dict[nn.Module, dict[tuple[str, int], Callable[[], torch.Tensor]]] = {}
        for ((layer, name, index), rows), level in zip(self.rows.items(), levels, strict=True):
            weights.setdefault(layer, {})[name, index] = partial(rows.weight, level)
        with ExitStack() as stack:
            for layer, own in weights.items():
                forward = self.replaced.get(layer, partial(_linear, layer))
                stack.enter_context(replaced_forward(layer, partial(forward, own)))
            return self.own(*args, **keywords)


def _linear(layer: nn.Module, weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's output with another weight, which is decoded only where the layer is given tokens.

    Args:
        layer: The layer.
        weights: Has its weight.
        inputs: Shape (..., in).
    """
    bias: Any = layer.bias
    if not inputs.numel():
        return inputs.new_zeros((*inputs.shape[:-1], layer.out_features))  # type: ignore[arg-type]
    weight = weights["weight", 0]()
    return functional.linear(inputs, weight, None if bias is None else bias.to(inputs.device))


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
    """Return nested tuples, lists and dicts with ``change`` applied to every tensor in them; other leaves stay."""
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
