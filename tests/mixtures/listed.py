"""A Mixtral whose experts are modules in a list, as transformers kept them before version 5."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from tests.mixtures.models import mixture


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=True)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))


class Routing(nn.Module):
    """Sends each token to some experts of a list, and to one that all tokens go to."""

    def __init__(self, hidden: int, inner: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.top_k = chosen
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList([Expert(hidden, inner) for _ in range(experts)])
        self.shared_expert = Expert(hidden, inner)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        scores, index = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        done = self.shared_expert(tokens)
        for expert, module in enumerate(self.experts):
            token, place = (index == expert).nonzero(as_tuple=True)
            done = done.index_add(0, token, module(tokens[token]) * scores[token, place, None])
        return done.view_as(hidden)


class Sent(nn.ModuleList):
    """Experts in a list that has a forward of its own, and is told by a router where tokens go."""

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = torch.zeros_like(hidden)
        for expert, module in enumerate(self):
            token, place = (index == expert).nonzero(as_tuple=True)
            if len(token):
                done.index_add_(0, token, module(hidden[token]) * scores[token, place, None])
        return done


class Sending(Routing):
    """Has a list with a forward of its own; tells it of a batch's tokens."""

    def __init__(self, hidden: int, inner: int, experts: int, chosen: int) -> None:
        super().__init__(hidden, inner, experts, chosen)
        self.experts = Sent(self.experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        scores, index = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        return (self.shared_expert(tokens) + self.experts(tokens, index, scores)).view_as(hidden)


class Named(Routing):
    """Has its experts by name."""

    def __init__(self, hidden: int, inner: int, experts: int, chosen: int) -> None:
        super().__init__(hidden, inner, experts, chosen)
        self.experts = nn.ModuleDict({f"expert_{index}": expert for index, expert in enumerate(self.experts)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        scores, index = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        done = self.shared_expert(tokens)
        for expert, module in enumerate(self.experts.values()):
            mask = (index == expert).any(-1)
            if mask.any():
                weight = (scores * (index == expert)).sum(-1)[mask, None]
                done[mask] += module(tokens[mask]) * weight
        return done.view_as(hidden)


def listed(
    experts: int = 4,
    chosen: int = 2,
    prepare: Callable[[Routing], None] | None = None,
    *,
    kind: type[Routing] = Routing,
) -> nn.Module:
    """Return a causal language model of two blocks with lists of experts, every parameter drawn.

    Args:
        experts: Number of them.
        chosen: How many each token goes to.
        prepare: Changes the mixture of every block.
        kind: Which mixture.
    """
    model = mixture("mixtral")
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = kind(32, 48, experts, chosen)
        with torch.no_grad():
            for parameter in layer.mlp.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        if prepare is not None:
            prepare(layer.mlp)
    return model.eval()
