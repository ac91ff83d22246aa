"""Runs the experts of a mixture with other weights for each row of a population, and shows what each expert is given.

transformers keeps all experts of a layer in one module with 3-D parameters (``gate_up_proj`` or ``up_proj``, then
``down_proj``), and its router says which experts each token goes to. Here (token, expert) pairs are sorted by expert
and by the levels that the token's row has of that expert, so that each weight is used once for all of its tokens. Each
row routes its own tokens; token t of a batch belongs to row t // (tokens / rows).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evosweep.models.device import moved
from evosweep.models.patch import replaced_forward
from evosweep.models.routing_types import Key, Rows, Seen, every_so_many

DOWN = "down_proj"
UP = ("gate_up_proj", "up_proj")
BATCHED = "Llama4TextExperts"  # given all tokens for every expert, those that it does not get as zeros


@dataclass(frozen=True)
class FusedMixture:
    """A module that keeps the matrices of all experts of a layer as 3-D parameters.

    Attributes:
        module: The module.
    """

    module: nn.Module

    def by_row(self, rows: Mapping[Key, Rows]) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch meets the experts' weights of its own levels."""
        return experts_by_row(self.module, rows)

    def watched(self, seen: Seen, *, every: int) -> AbstractContextManager[None]:
        """Return a context in which ``seen`` is shown what each matrix is given; arguments: ``watched_experts``."""
        return watched_experts(self.module, seen, every=every)


def up_attribute(module: nn.Module) -> str | None:
    """Return the name of the parameter with the experts' first matrices; None where a module is no fused mixture."""
    down = getattr(module, DOWN, None)
    names = [name for name in UP if getattr(getattr(module, name, None), "ndim", 0) == 3]
    known = hasattr(module, "is_transposed") or _is_batched(module) or _is_plain(module)
    fused = known and isinstance(down, nn.Parameter) and down.ndim == 3
    return names[0] if fused and names else None


def attributes(module: nn.Module) -> tuple[str, str]:
    """Return the names of the parameters with the experts' first and second matrices of a fused mixture."""
    return str(up_attribute(module)), DOWN


def count(module: nn.Module) -> int:
    """Return the number of experts of a fused mixture."""
    return len(getattr(module, DOWN))


def is_swapped(module: nn.Module) -> bool:
    """Return whether a fused mixture keeps its matrices as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", _is_batched(module)))


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module without the flags of transformers is called as those with them are: Step 3.7, LongCat."""
    called = list(inspect.signature(type(module).forward).parameters)[1:]
    return called == ["hidden_states", "top_k_index", "top_k_weights"]


def _is_batched(module: nn.Module) -> bool:
    return type(module).__name__ == BATCHED


@dataclass(frozen=True)
class _Dense:
    """The matrices of a fused mixture as they are, for all rows.

    Attributes:
        module: The mixture.
    """

    module: nn.Module

    def weight(self, attribute: str, expert: int, level: int) -> torch.Tensor:
        """Return one expert's matrix as an (out, in) view.

        Args:
            attribute: Name of the parameter.
            expert: Index of the expert.
            level: Not read.
        """
        del level
        whole: torch.Tensor = getattr(self.module, attribute)
        return whole[expert].T if is_swapped(self.module) else whole[expert]

    def levels_of(self, token: torch.Tensor, expert: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the level of the first and the second matrix of each pair, shape (2, pairs).

        Args:
            token: Index of each pair's token.
            expert: Index of each pair's expert.
            tokens: Number of tokens.
        """
        del token, tokens
        return expert.new_zeros((2, len(expert)))


@dataclass(frozen=True)
class _ByRow(_Dense):
    """The matrices that each row of a population has.

    Attributes:
        rows: Levels of the rows by matrix; one that is not there stays as it is.
    """

    rows: Mapping[Key, Rows]

    def weight(self, attribute: str, expert: int, level: int) -> torch.Tensor:
        """Return one expert's matrix (out, in) at a level; arguments as for ``_Dense``."""
        rows = self.rows.get((attribute, expert))
        return super().weight(attribute, expert, level) if rows is None else rows.weight(level)

    @cached_property
    def _table(self) -> npt.NDArray[np.int64]:
        """Level of each row, shape (2, experts, rows)."""
        none = np.zeros_like(next(iter(self.rows.values())).levels)
        table = np.tile(none, (2, count(self.module), 1))
        for (attribute, expert), rows in self.rows.items():
            table[attributes(self.module).index(attribute), expert] = rows.levels
        return table

    def levels_of(self, token: torch.Tensor, expert: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the levels of each pair's matrices; arguments as for ``_Dense``."""
        row = token // (tokens // self._table.shape[2])
        return moved(self._table, token.device)[:, expert.clamp(max=self._table.shape[1] - 1), row]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a token and an expert that it goes to.

    Attributes:
        token: Index of each pair's token, shape (pairs,).
        expert: Index of its expert; one beyond the last expert gives zeros.
        source: Index of its hidden states in the batch.
    """

    token: torch.Tensor
    expert: torch.Tensor
    source: torch.Tensor


@dataclass(frozen=True)
class _StandIn:
    """Stands in for the forward of a fused mixture.

    Attributes:
        module: The mixture.
        matrices: Its matrices.
        seen: Given the inputs of each matrix; None: nothing is.
    """

    module: Any
    matrices: _Dense
    seen: Seen | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        **named: torch.Tensor,
    ) -> torch.Tensor:
        """Return the mixture's output, shape as ``hidden``.

        Args:
            hidden: Hidden states (tokens, hidden); of a batched mixture (experts · tokens, hidden).
            top_k_index: Experts that each token goes to, shape (tokens, chosen).
            top_k_weights: Their weights, of the same shape.
            **named: The same under other names: ``router_indices``, ``routing_weights``.
        """
        if _is_batched(self.module):
            return self._batched(hidden)
        index = named["router_indices"] if top_k_index is None else top_k_index
        scores = named["routing_weights"] if top_k_weights is None else top_k_weights
        tokens, chosen = index.shape
        token = torch.arange(tokens * chosen, device=hidden.device) // chosen
        outputs = self.run(hidden, _Pairs(token, index.reshape(-1), token), tokens)
        weighted = outputs * scores.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden.dtype)

    def _batched(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = len(hidden) // count(self.module)
        given = hidden.ne(0).any(dim=-1).nonzero()[:, 0]  # without a bias, zeros stay zeros
        outputs = self.run(hidden, _Pairs(given % tokens, given // tokens, given), tokens)
        return torch.zeros_like(hidden).index_copy_(0, given, outputs)

    def run(self, hidden: torch.Tensor, pairs: _Pairs, tokens: int) -> torch.Tensor:
        """Return the output of each pair, shape (pairs, hidden).

        Args:
            hidden: Hidden states.
            pairs: Which of them meet which expert.
            tokens: Number of tokens.
        """
        experts = count(self.module)
        levels = self.matrices.levels_of(pairs.token, pairs.expert, tokens)
        first, second = (levels.amax(dim=1) + 1).tolist() if levels.numel() else (1, 1)
        key = (pairs.expert * first + levels[0]) * second + levels[1]
        order = key.argsort(stable=True)
        counts = torch.bincount(key, minlength=experts * first * second).tolist()[: experts * first * second]
        met = [(number // second, number % second, size) for number, size in enumerate(counts) if size]
        up, down = attributes(self.module)
        token = pairs.token[order]
        stretches = _joined([(number // first, number % first, size) for number, _, size in met])
        inner = self._gated(self._times(up, stretches, hidden[pairs.source[order]], token))
        outer = self._times(down, [(number // first, level, size) for number, level, size in met], inner, token)
        if getattr(self.module, "has_post_expert_norm", False):
            outer = self.module.post_expert_norm(outer)
        if hasattr(self.module, "identity_expert"):  # LongCat: those beyond the last expert return what they are given
            outer = torch.cat([outer, hidden[pairs.source[order[len(outer) :]]]])
        made = outer.new_empty if len(outer) == len(key) else outer.new_zeros
        return made((len(key), outer.shape[-1])).index_copy_(0, order[: len(outer)], outer)

    def _times(
        self, attribute: str, stretches: Sequence[tuple[int, int, int]], inputs: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Return sorted inputs times their matrices.

        Args:
            attribute: Which matrices.
            stretches: Expert, level and length of each stretch of inputs.
            inputs: Shape (pairs, in).
            token: Index of each input's token.
        """
        bias = getattr(self.module, f"{attribute}_bias", None)
        rows = inputs.new_empty((sum(size for _, _, size in stretches), self.width(attribute)))
        done = []
        start = 0
        for expert, level, size in stretches:
            stretch = slice(start, start + size)
            start += size
            if self.seen is not None:
                self.seen(attribute, expert, inputs[stretch], routed=True)
            # Where blocks visit the device one by one, replaced ones stay on the host.
            weight = self.matrices.weight(attribute, expert, level).to(inputs.device)
            offset = None if bias is None else bias[expert].to(inputs.device)
            done.append(_product(inputs[stretch], weight, offset, rows[stretch]))
        return torch.cat(done) if torch.is_grad_enabled() and done else rows

    def width(self, attribute: str) -> int:
        """Return how wide the outputs of the first or the second matrices are."""
        return int(getattr(self.module, attribute).shape[2 if is_swapped(self.module) else 1])

    def _gated(self, inner: torch.Tensor) -> torch.Tensor:
        """Return the activation of the first matrices' outputs."""
        gated: torch.Tensor
        if getattr(self.module, "has_gate", True) and hasattr(self.module, "_apply_gate"):
            gated = self.module._apply_gate(inner)
        elif up_attribute(self.module) == UP[0]:
            gate, up = inner.chunk(2, dim=-1)
            gated = up * self.module.act_fn(gate)
        else:
            gated = self.module.act_fn(inner)
        return gated


def _product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's output; without gradients it is written where it is wanted, instead of copied there.

    Args:
        inputs: Shape (pairs, in).
        weight: Shape (out, in).
        bias: Shape (out,), if there is one.
        out: Shape (pairs, out).
    """
    if torch.is_grad_enabled():
        return functional.linear(inputs, weight, bias)
    return torch.mm(inputs, weight.T, out=out) if bias is None else torch.addmm(bias, inputs, weight.T, out=out)


def _joined(stretches: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return stretches (expert, level, length) with neighbours of the same expert and level joined."""
    found: list[tuple[int, int, int]] = []
    for expert, level, size in stretches:
        before = found.pop()[2] if found and found[-1][:2] == (expert, level) else 0
        found.append((expert, level, before + size))
    return found


@contextmanager
def experts_by_row(module: nn.Module, rows: Mapping[Key, Rows]) -> Iterator[None]:
    """Multiply each row of a batch with the experts' weights of its own levels while the context lasts.

    Contexts of different experts of one mixture may be nested.

    Args:
        module: The fused mixture.
        rows: Levels of the rows by matrix; one that is not there stays as it is.
    """
    around = vars(module).get("forward")
    matrices = around.matrices if isinstance(around, _StandIn) else None
    others = matrices.rows if isinstance(matrices, _ByRow) else {}
    with replaced_forward(module, _StandIn(module, _ByRow(module, {**others, **rows}))):
        yield


@contextmanager
def watched_experts(module: nn.Module, seen: Seen, *, every: int) -> Iterator[None]:
    """Show what each expert's matrices are given while the context lasts.

    Beside the tokens that the router sends to it, each expert is shown every so many tokens of all, so that something
    is known of an expert that no token goes to; what it makes of them is thrown away.

    Args:
        module: The fused mixture.
        seen: Given the inputs of each matrix.
        every: How many tokens lie between two that all experts are shown.
    """
    with replaced_forward(module, _Watched(_StandIn(module, _Dense(module), seen), seen, every)):
        yield


@dataclass
class _Watched:
    """The forward of a mixture that shows its experts every so many tokens, and then runs as ever.

    Attributes:
        forward: Stands in for the mixture's forward.
        seen: Given the inputs of each matrix.
        every: How many tokens lie between two that all experts are shown.
        passed: Number of tokens so far.
    """

    forward: _StandIn
    seen: Seen
    every: int
    passed: int = 0

    def __call__(self, hidden: torch.Tensor, *rest: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """Return the mixture's output; arguments as for ``_StandIn``."""
        module = self.forward.module
        experts = count(module)
        plain = hidden.unflatten(0, (experts, -1)).sum(dim=0) if _is_batched(module) else hidden
        chosen = every_so_many(plain, passed=self.passed, every=self.every)
        self.passed += len(plain)
        token = chosen.repeat(experts)
        expert = torch.arange(experts, device=hidden.device).repeat_interleave(len(chosen))
        _StandIn(module, _Dense(module), self._unrouted).run(plain, _Pairs(token, expert, token), len(plain))
        return self.forward(hidden, *rest, **named)

    def _unrouted(self, attribute: str, expert: int, inputs: torch.Tensor, *, routed: bool) -> None:
        """Pass on inputs that the router did not send; arguments as for ``Seen``."""
        del routed
        self.seen(attribute, expert, inputs, routed=False)
