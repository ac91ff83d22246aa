"""From final hidden state to logits: one matrix where the model allows it, the model's own code where not."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from evosweep.models.patch import replaced_forward

PROBE_TOKENS = 4
PROBE_LOGIT = 200.0


@dataclass(frozen=True)
class Head:
    """The output head.

    Attributes:
        model: The causal language model.
        base: The model under the head.
        weight: Output matrix, shape (vocabulary, hidden).
        bias: Its bias, shape (vocabulary,), or None.
        linear: Whether logits are ``hidden @ weight.T + bias`` and nothing more. A soft-cap or a scale makes it
            false; logits then come from the model's own code.
        output: What ``base`` returned once; the general path hands it to the model with other hidden states.
    """

    model: nn.Module
    base: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    linear: bool
    output: Any

    @classmethod
    def of(cls, model: nn.Module, base: nn.Module) -> "Head":
        """Find the head of a model and check on some tokens whether it is linear."""
        layer: Any = model.get_output_embeddings()  # type: ignore[operator]
        tokens = torch.arange(PROBE_TOKENS, device=layer.weight.device)[None]
        with torch.no_grad():
            output = base(input_ids=tokens, use_cache=False)
            head = cls(model=model, base=base, weight=layer.weight, bias=layer.bias, linear=False, output=output)
            hidden = output[0][0]
            # Loud enough to reach any cap.
            hidden = hidden * (PROBE_LOGIT / float(functional.linear(hidden, layer.weight).abs().max().clamp(min=1e-6)))
            plain, logits = replace(head, linear=True).logits(hidden), head.logits(hidden)
        return replace(head, linear=bool(torch.allclose(plain, logits, rtol=1e-2, atol=1e-2 * PROBE_LOGIT)))

    def piece(self, start: int, stop: int) -> "Head":
        """Return a linear head of the vocabulary's rows ``start`` to ``stop``."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) for hidden states (tokens, hidden)."""
        if self.linear:
            return functional.linear(hidden, self.weight, self.bias).float()
        tokens = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        final = copy.copy(self.output)
        final["last_hidden_state"] = hidden[None]
        with replaced_forward(self.base, lambda *_args, **_kwargs: final):
            return self.model(input_ids=tokens, use_cache=False).logits[0].float()
