"""From final hidden state to logits: one matrix where the model allows it, the model's own code where not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPast

from evosweep.models.patch import replaced_forward

PROBE_TOKENS = 4


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
    """

    model: nn.Module
    base: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    linear: bool

    @classmethod
    def of(cls, model: nn.Module, base: nn.Module) -> "Head":
        """Find the head of a model and check on some tokens whether it is linear."""
        layer: Any = model.get_output_embeddings()  # type: ignore[operator]
        tokens = torch.arange(PROBE_TOKENS, device=layer.weight.device)[None]
        with torch.no_grad():
            hidden = base(input_ids=tokens, use_cache=False)[0]
            plain = functional.linear(hidden, layer.weight, layer.bias).float()
            logits = model(input_ids=tokens, use_cache=False).logits.float()
        linear = bool(torch.allclose(plain, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())))
        return cls(model=model, base=base, weight=layer.weight, bias=layer.bias, linear=linear)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) for hidden states (tokens, hidden)."""
        if self.linear:
            return functional.linear(hidden, self.weight, self.bias).float()
        tokens = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        final = BaseModelOutputWithPast(last_hidden_state=hidden[None])
        with replaced_forward(self.base, lambda *_args, **_kwargs: final):
            return self.model(input_ids=tokens, use_cache=False).logits[0].float()
