"""Mixtures whose experts are kept in parameters of a shape of their own: DBRX, JetMoe.

Their module for all experts' matrices is told which tokens belong to which expert, but not which rows of a population
those come from. So rows with the same levels run together through the module that routes, as for experts in a list.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from evosweep.models.grouped_rows import Weights, in_groups
from evosweep.models.routing_types import Key, Rows, Seen, every_so_many


class Kind(Protocol):
    """How a class of modules keeps and uses the matrices of all experts.

    Attributes:
        swapped: By name of a parameter, whether an expert's matrix is (in, out) in it.
        leader: By name of a parameter, the first one whose matrices have the same input.
    """

    swapped: Mapping[str, bool]
    leader: Mapping[str, str]

    def count(self, module: Any) -> int:
        """Return how many experts a module holds."""

    def given(self, module: Any, args: tuple[Any, ...]) -> Iterable[tuple[int, torch.Tensor]]:
        """Return the experts and their tokens, from the arguments of a module's forward."""

    def inputs(self, module: Any, expert: int, tokens: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Return what each matrix of an expert is given, by the parameter's name.

        Args:
            module: The module.
            expert: Index of the expert.
            tokens: What the expert is given, shape (tokens, hidden).
        """

    def forward(self, module: Any, weights: Weights, *args: Any) -> torch.Tensor:
        """Return the module's output with other matrices (out, in), by name of the parameter and index of the expert.

        Args:
            module: The module.
            weights: Functions that return them; a matrix that is not there stays as it is.
            *args: Of the module's forward.
        """


class _Parallel:
    """JetMoeParallelExperts: inputs sorted by expert, and how many there are of each."""

    swapped: Mapping[str, bool] = {"weight": False}
    leader: Mapping[str, str] = {"weight": "weight"}

    def count(self, module: Any) -> int:
        """Return how many experts a module holds."""
        return len(module.weight)

    def given(self, module: Any, args: tuple[Any, ...]) -> Iterable[tuple[int, torch.Tensor]]:
        """Return each expert's index with the tokens that were routed to it, shape (tokens, hidden)."""
        del module
        inputs, sizes = args
        return enumerate(inputs.split(sizes))

    def inputs(self, module: Any, expert: int, tokens: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Return the one matrix's name with its input, shape (tokens, in)."""
        del module, expert
        return [("weight", tokens)]

    def forward(self, module: Any, weights: Weights, *args: Any) -> torch.Tensor:
        """Return the module's output; arguments as for ``Kind``."""
        return torch.cat(
            [
                functional.linear(tokens, matrix(module, weights, "weight", expert, tokens))
                if len(tokens)
                else tokens.new_empty((0, module.weight.shape[1]))
                for expert, tokens in self.given(module, args)
            ]
        )


class _GatedUnits:
    """DbrxExpertGLU: the tokens of one expert, and its three matrices, which say by their place which expert it is."""

    swapped: Mapping[str, bool] = {"w1": False, "v1": False, "w2": True}
    leader: Mapping[str, str] = {"w1": "w1", "v1": "w1", "w2": "w2"}

    def count(self, module: Any) -> int:
        """Return how many experts a module holds."""
        return int(module.moe_num_experts)

    def given(self, module: Any, args: tuple[Any, ...]) -> Iterable[tuple[int, torch.Tensor]]:
        """Return the one expert's index with the tokens that were routed to it, shape (tokens, hidden)."""
        tokens, first = args[:2]
        return [((first.storage_offset() - module.w1.storage_offset()) // first.numel(), tokens)]

    def inputs(self, module: Any, expert: int, tokens: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Return each matrix's name with its input, shape (tokens, in)."""
        return [("w1", tokens), ("v1", tokens), ("w2", self._inner(module, {}, expert, tokens))]

    def forward(self, module: Any, weights: Weights, *args: Any) -> torch.Tensor:
        """Return the module's output; arguments as for ``Kind``."""
        ((expert, tokens),) = self.given(module, args)
        inner = self._inner(module, weights, expert, tokens)
        return functional.linear(inner, matrix(module, weights, "w2", expert, tokens))

    def _inner(self, module: Any, weights: Weights, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """Return the input of the last matrix; arguments as for ``forward``."""
        gate, up = (functional.linear(tokens, matrix(module, weights, name, expert, tokens)) for name in ("w1", "v1"))
        found: torch.Tensor = module.activation_fn(gate) * up
        return found


KINDS: Mapping[str, Kind] = {"JetMoeParallelExperts": _Parallel(), "DbrxExpertGLU": _GatedUnits()}
"""By name of the class, as transformers' classes are imported only where a model has them."""


def kind_of(module: nn.Module) -> Kind | None:
    """Return how a module keeps the matrices of experts; None where it keeps none, or otherwise."""
    return KINDS.get(type(module).__name__)


def matrix(module: Any, weights: Weights, name: str, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return an expert's matrix (out, in), on the device of its inputs.

    Args:
        module: The module that keeps it.
        weights: Matrices that it has instead.
        name: Of the parameter.
        expert: Index of the expert.
        tokens: Its inputs.
    """
    other = weights.get((name, expert))
    found = packed_view(module, name, expert, getattr(module, name)) if other is None else other()
    return found.to(tokens.device)


def packed_view(module: Any, name: str, expert: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return one expert's (out, in) view of a tensor laid out as a parameter.

    Args:
        module: Has the parameter.
        name: Of the parameter.
        expert: Index of the expert.
        tensor: The parameter, or its gradient.
    """
    kind = KINDS[type(module).__name__]
    own = tensor.reshape(kind.count(module), -1, tensor.shape[-1])[expert]
    return own.T if kind.swapped[name] else own


@dataclass(frozen=True, eq=False)
class PackedMixture:
    """A module that routes, with modules in it that keep the matrices of all experts.

    Attributes:
        name: Path of the module that routes.
        module: That module.
        owners: The modules in it, by path.
        active: How many experts each token goes to.
        paths: Paths of modules that are single experts: none.
    """

    name: str
    module: nn.Module
    owners: Mapping[str, nn.Module]
    active: int
    paths: tuple[str, ...] = ()

    def by_row(self, rows: Mapping[Key, Rows]) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch meets the experts' weights of its own levels.

        Args:
            rows: Levels of the rows by path of the parameter and index of the expert.
        """
        found = {}
        for (path, expert), levels in rows.items():
            owner, _, name = path.rpartition(".")
            found[self.owners[owner], name, expert] = levels
        replaced = {owner: partial(KINDS[type(owner).__name__].forward, owner) for owner in self.owners.values()}
        return in_groups(self.module, found, replaced)

    @contextmanager
    def watched(self, seen: Seen, *, every: int) -> Iterator[None]:
        """Show what each expert's matrices are given while the context lasts; arguments as for ``watched_experts``."""
        with ExitStack() as stack:
            for path, owner in self.owners.items():
                watch = _Watch(path, KINDS[type(owner).__name__], seen, every)
                stack.callback(owner.register_forward_pre_hook(watch.given).remove)
            yield


@dataclass
class _Watch:
    """Shows what experts are given, and shows each of them every so many tokens that any of them is given.

    Attributes:
        path: Of the module that keeps their matrices.
        kind: Of that module.
        seen: Given the inputs of each matrix.
        every: How many tokens lie between two that all experts are shown.
        passed: Number of tokens so far.
    """

    path: str
    kind: Kind
    seen: Seen
    every: int
    passed: int = 0

    def given(self, module: Any, args: tuple[Any, ...]) -> None:
        """Pass on the inputs of all matrices."""
        for expert, tokens in self.kind.given(module, args):
            if len(tokens):
                self._show(module, expert, tokens, routed=True)
            chosen = every_so_many(tokens, passed=self.passed, every=self.every)
            self.passed += len(tokens)
            for other in range(self.kind.count(module) if len(chosen) else 0):
                self._show(module, other, tokens[chosen], routed=False)

    def _show(self, module: Any, expert: int, tokens: torch.Tensor, *, routed: bool) -> None:
        for name, inputs in self.kind.inputs(module, expert, tokens):
            self.seen(f"{self.path}.{name}", expert, inputs, routed=routed)
