"""The output head, from final hidden states to logits: one matrix where that is all, else the model's own code."""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from evosweep.core.errors import ModelError
from evosweep.models.patch import replaced_forward, replaced_parameter

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
        output: An output of ``base``; the general path gives it to the model with other hidden states in it.
    """

    model: nn.Module
    base: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    linear: bool
    output: Any

    @classmethod
    def of(cls, model: nn.Module, base: nn.Module) -> "Head":
        """Return the head of a model, checked on some tokens whether it is linear.

        Raises:
            ModelError: The model has no output matrix.
        """
        layer: Any = model.get_output_embeddings()  # type: ignore[operator]
        if layer is None:
            raise ModelError(f"{type(model).__name__} has no output head, so it is no causal language model")
        tokens = torch.arange(PROBE_TOKENS, device=layer.weight.device)[None]
        with torch.no_grad():
            output = base(input_ids=tokens, use_cache=False)
            head = cls(
                model=model,
                base=base,
                weight=layer.weight,
                bias=getattr(layer, "bias", None),
                linear=False,
                output=output,
            )
            hidden = output[0][0].to(layer.weight.dtype)  # as the model does: Mamba's stream is fp32 in bfloat16, too
            # Large enough to reach any cap.
            hidden = hidden * (PROBE_LOGIT / float(functional.linear(hidden, layer.weight).abs().max().clamp(min=1e-6)))
            plain = replace(head, linear=True).logits(hidden)
            logits = head.logits(hidden)
        return replace(head, linear=bool(torch.allclose(plain, logits, rtol=1e-2, atol=1e-2 * PROBE_LOGIT)))

    def with_weight(self, weight: torch.Tensor) -> "Head":
        """Return the same head with another matrix (vocabulary, hidden)."""
        return replace(self, weight=weight)

    def piece(self, start: int, stop: int) -> "Head":
        """Return a linear head of the vocabulary's rows ``start`` to ``stop``."""
        head = self.wide
        bias = None if head.bias is None else head.bias[start:stop]
        return replace(head, weight=head.weight[start:stop], bias=bias)

    @cached_property
    def wide(self) -> "Head":
        """The same head in fp32 on a CPU, which cannot multiply half-precision factors into fp32 sums; else itself."""
        if self.weight.device.type != "cpu" or self.weight.dtype is torch.float32:
            return self
        return replace(self, weight=self.weight.float(), bias=None if self.bias is None else self.bias.float())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) for hidden states (tokens, hidden)."""
        if self.linear:
            return linear_fp32(hidden, self.wide.weight, self.wide.bias)
        tokens = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        final = copy.copy(self.output)
        final["last_hidden_state"] = hidden[None]
        layer: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.base, lambda *_args, **_kwargs: final))
            if self.weight is not layer.weight:
                stack.enter_context(replaced_parameter(layer, "weight", self.weight))
            return self.model(input_ids=tokens, use_cache=False).logits[0].float()


def linear_fp32(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``hidden @ weight.T + bias`` in fp32, whatever the inputs' type, with no rounding to it in between.

    A logit of 20 rounded to bfloat16 is off by up to 0.06, and a divergence of the dense model from itself by as much.
    CUDA multiplies half-precision factors as fast as ever and keeps its fp32 sums; a CPU cannot, so factors are
    widened there.

    Args:
        hidden: Hidden states (tokens, hidden).
        weight: Rows of the head's matrix (vocabulary, hidden).
        bias: Its bias (vocabulary,), or None.
    """
    if hidden.dtype is torch.float32:
        return functional.linear(hidden, weight, bias)
    if hidden.device.type == "cuda":
        product = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    return functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
