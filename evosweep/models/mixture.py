"""Runs the experts of a mixture with other weights for each row of a population, and shows what each expert is given.

transformers keeps all experts of a layer in one module with 3-D parameters (``gate_up_proj`` or ``up_proj``, then
``down_proj``), and its router says which experts each token goes to. Here (token, expert) pairs are sorted by expert
and by the levels that the token's row has of that expert, so that each weight is used once for all of its tokens. Each
row routes its own tokens; token t of a batch belongs to row t // (tokens / rows).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evosweep.models.device import moved
from evosweep.models.patch import replaced_forward

DOWN = "down_proj"
UP = ("gate_up_proj", "up_proj")
BATCHED = "Llama4TextExperts"  # given all tokens for every expert, those that it does not get as zeros
Levels = Mapping[tuple[str, int], npt.NDArray[np.int64]]
Weight = Callable[[str, int, int], torch.Tensor]


class Seen(Protocol):
    """Signature of a function that is told what each expert's matrix is given."""

    def __call__(self, attribute: str, expert: int, inputs: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Take some inputs.

        Args:
            attribute: Name of the parameter that holds the matrix.
            expert: Index of the expert.
            inputs: Shape (some tokens, in).
            tokens: Their indices in the batch; None where the router did not send them to this expert.
        """


def up_attribute(module: nn.Module) -> str | None:
    """Return the name of the parameter with the experts' first matrices; None where a module is no fused mixture."""
    down = getattr(module, DOWN, None)
    names = [name for name in UP if getattr(getattr(module, name, None), "ndim", 0) == 3]
    known = hasattr(module, "is_transposed") or type(module).__name__ == BATCHED
    fused = known and isinstance(down, nn.Parameter) and down.ndim == 3
    return names[0] if fused and names else None


def _is_batched(module: nn.Module) -> bool:
    return type(module).__name__ == BATCHED


def is_swapped(module: nn.Module) -> bool:
    """Return whether a fused mixture keeps its matrices as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", True))


def matrix(module: nn.Module, attribute: str, expert: int) -> torch.Tensor:
    """Return one expert's matrix as an (out, in) view.

    Args:
        module: A fused mixture.
        attribute: Name of the parameter.
        expert: Index of the expert.
    """
    whole: torch.Tensor = getattr(module, attribute)
    return whole[expert].T if is_swapped(module) else whole[expert]


@dataclass(frozen=True)
class _Run:
    """Multiplies pairs of a token and an expert with that expert's two matrices.

    Attributes:
        module: The fused mixture.
        weight: Weight (out, in) by attribute, expert and level.
        seen: Told what each matrix is given; None: nobody.
    """

    module: Any
    weight: Weight
    seen: Seen | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        token: torch.Tensor,
        expert: torch.Tensor,
        levels: torch.Tensor,
        *,
        source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output of each pair, shape (pairs, hidden).

        Args:
            hidden: Hidden states (tokens, hidden).
            token: Index of each pair's token.
            expert: Index of each pair's expert; one beyond the last expert gives zeros.
            levels: Level of each pair's first and second matrix, shape (2, pairs).
            source: Index of each pair's hidden states, where that is not the token's.
        """
        up = up_attribute(self.module)
        assert up is not None
        experts = len(getattr(self.module, up))
        sizes = [int(size) for size in levels.amax(dim=1) + 1] if levels.numel() else [1, 1]
        key = (expert * sizes[0] + levels[0]) * sizes[1] + levels[1]
        order = key.argsort(stable=True)
        counts = torch.bincount(key, minlength=experts * sizes[0] * sizes[1]).tolist()
        by_pair = [
            (number // (sizes[0] * sizes[1]), number // sizes[1] % sizes[0], number % sizes[1], count)
            for number, count in enumerate(counts[: experts * sizes[0] * sizes[1]])
            if count
        ]
        whose = token[order]
        given = hidden[whose if source is None else source[order]]
        inner = self._times(up, _joined(by_pair), given, whose)
        inner = self._gated(inner)
        outer = self._times(DOWN, [(number, second, count) for number, _, second, count in by_pair], inner, whose)
        if getattr(self.module, "has_post_expert_norm", False):
            outer = self.module.post_expert_norm(outer)
        found = outer.new_zeros((len(key), outer.shape[-1]))
        return found.index_copy_(0, order[: len(outer)], outer)

    def _times(
        self, attribute: str, parts: list[tuple[int, int, int]], inputs: torch.Tensor, whose: torch.Tensor
    ) -> torch.Tensor:
        """Return sorted inputs times their matrices.

        Args:
            attribute: Which matrices.
            parts: Expert, level and number of inputs of each stretch of inputs.
            inputs: Shape (pairs, in).
            whose: Index of each input's token.
        """
        bias = getattr(self.module, f"{attribute}_bias", None)
        done = []
        start = 0
        for expert, level, count in parts:
            stretch = slice(start, start + count)
            if self.seen is not None:
                self.seen(attribute, expert, inputs[stretch], whose[stretch])
            offset = None if bias is None else bias[expert].to(inputs.device)
            weight = self.weight(attribute, expert, level).to(inputs.device)  # its block may only visit the device
            done.append(functional.linear(inputs[stretch], weight, offset))
            start += count
        return torch.cat(done) if done else inputs.new_zeros((0, matrix(self.module, attribute, 0).shape[0]))

    def _gated(self, inner: torch.Tensor) -> torch.Tensor:
        """Return the activation of the first matrices' outputs."""
        if _is_batched(self.module):
            gate, up = inner.chunk(2, dim=-1)
            product: torch.Tensor = up * self.module.act_fn(gate)
            return product
        gated: torch.Tensor = self.module._apply_gate(inner) if self.module.has_gate else self.module.act_fn(inner)
        return gated


def _joined(parts: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    """Return stretches of pairs with those joined that differ in the level of the second matrix alone."""
    found: list[tuple[int, int, int]] = []
    for expert, level, _, count in parts:
        before = found.pop()[2] if found and found[-1][:2] == (expert, level) else 0
        found.append((expert, level, before + count))
    return found


@contextmanager
def experts_by_row(module: nn.Module, levels: Levels, weight: Weight) -> Iterator[None]:
    """Multiply each row of a batch with the experts' weights of its own levels while the context lasts.

    Args:
        module: The fused mixture.
        levels: Level of each row, shape (rows,), by attribute and expert; a matrix that is not there stays as it is.
        weight: Weight (out, in) by attribute, expert and level.
    """
    rows = len(next(iter(levels.values())))
    experts = len(getattr(module, DOWN))
    names = (up_attribute(module), DOWN)
    device = getattr(module, DOWN).device
    none = np.zeros(rows, dtype=np.int64)
    tables = np.stack([[levels.get((str(name), expert), none) for expert in range(experts)] for name in names])
    by_device: dict[torch.device, torch.Tensor] = {device: moved(tables, device)}

    def of(attribute: str, expert: int, level: int) -> torch.Tensor:
        if (attribute, expert) in levels:
            return weight(attribute, expert, level)
        return matrix(module, attribute, expert)

    def levels_of(token: torch.Tensor, expert: torch.Tensor, tokens: int) -> torch.Tensor:
        table = by_device.setdefault(token.device, by_device[device].to(token.device))
        return table[:, expert.clamp(max=experts - 1), token // (tokens // rows)]

    with replaced_forward(module, _forward(module, _Run(module, of), levels_of)):
        yield


@contextmanager
def watched_experts(module: nn.Module, seen: Seen, *, every: int) -> Iterator[None]:
    """Show what each expert's matrices are given while the context lasts.

    Beside the tokens that the router sends to it, each expert is shown every so many tokens of all, so that something
    is known of an expert that no token goes to; what it makes of them is thrown away.

    Args:
        module: The fused mixture.
        seen: Told what the matrices are given.
        every: How many tokens lie between two that all experts are shown.
    """
    experts = len(getattr(module, DOWN))
    passed = 0

    def of(attribute: str, expert: int, level: int) -> torch.Tensor:
        del level
        return matrix(module, attribute, expert)

    def levels_of(token: torch.Tensor, expert: torch.Tensor, tokens: int) -> torch.Tensor:
        del token, tokens
        return expert.new_zeros((2, len(expert)))

    def sampled(attribute: str, expert: int, inputs: torch.Tensor, tokens: torch.Tensor | None) -> None:
        del tokens
        seen(attribute, expert, inputs, None)

    forward = _forward(module, _Run(module, of, seen), levels_of)

    def shown(hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        nonlocal passed
        plain = hidden.unflatten(0, (experts, -1)).sum(dim=0) if _is_batched(module) else hidden
        chosen = torch.arange(-passed % every, len(plain), every, device=hidden.device)
        passed += len(plain)
        token = chosen.repeat(experts)
        expert = torch.arange(experts, device=hidden.device).repeat_interleave(len(chosen))
        _Run(module, of, sampled)(plain, token, expert, levels_of(token, expert, 0))
        return forward(hidden, *rest)

    with replaced_forward(module, shown):
        yield


def _forward(
    module: nn.Module, run: _Run, levels_of: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Return what stands in for a mixture's forward.

    Args:
        module: The fused mixture.
        run: Multiplies.
        levels_of: From tokens, experts and the number of tokens to the levels of each pair's two matrices.
    """

    def routed(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        tokens, chosen = top_k_index.shape
        expert = top_k_index.reshape(-1)
        token = torch.arange(tokens * chosen, device=hidden.device) // chosen
        outputs = run(hidden, token, expert, levels_of(token, expert, tokens))
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden.dtype)

    def batched(hidden: torch.Tensor) -> torch.Tensor:
        tokens = len(hidden) // len(getattr(module, DOWN))
        given = hidden.ne(0).any(dim=-1).nonzero()[:, 0]  # without a bias, zeros stay zeros
        token = given % tokens
        expert = given // tokens
        outputs = run(hidden, token, expert, levels_of(token, expert, tokens), source=given)
        return torch.zeros_like(hidden).index_copy_(0, given, outputs)

    return batched if _is_batched(module) else routed
