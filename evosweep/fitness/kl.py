"""Kullback-Leibler divergence from the dense model, over the whole vocabulary."""

from collections.abc import Mapping

import torch

from evosweep.fitness.base import Outputs
from evosweep.models.head import Head


class KL:
    """KL(dense ‖ compressed) in nats per token, exact, in memory of hidden size.

    With p the dense model's next-token distribution, W and b the linear head, h₀ and h the final hidden states of the
    dense and the compressed model, and lse(h) = log Σ exp(W h + b):

        KL = (h₀ − h)·(Wᵀp) + lse(h) − lse(h₀)

    The head's bias cancels. Only Wᵀp and the number h₀·(Wᵀp) − lse(h₀) are kept of the dense model; rounding Wᵀp is
    harmless, as only its product with h₀ − h counts. A compressed head has targets of its own. For a head that is not
    linear the dense hidden state is kept, and both logits are computed in chunks.
    """

    name = "kl"

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return ``mean_row`` (tokens, hidden) and ``constant`` (tokens,); ``hidden`` where the head is not linear."""
        head = dense.head
        if not head.linear:
            return {"hidden": dense.hidden}
        # fp16 rows for models in half precision: 11 bits are more than their own hidden states have.
        width = torch.float32 if dense.hidden.dtype is torch.float32 else torch.float16
        rows = torch.empty(dense.hidden.shape, device=dense.hidden.device, dtype=width)
        constant = torch.empty(len(dense.hidden), device=dense.hidden.device)
        if dense.other is not None:
            return self._targets_of(dense, dense.other)
        for span, logits in dense.logits():
            total = torch.logsumexp(logits, dim=1)
            rows[span] = ((logits - total[:, None]).exp() @ head.wide.weight.float()).to(width)
            constant[span] = (dense.hidden[span].float() * rows[span].float()).sum(dim=1) - total
        return {"mean_row": rows, "constant": constant}

    @staticmethod
    def _targets_of(dense: Outputs, head: Head) -> dict[str, torch.Tensor]:
        """Return the targets for a compressed head W̃: W̃ᵀp, and Σ p log p − b·p, both in fp32.

        KL = Σ p log p − p·(W̃ h + b) + lse(W̃ h + b). Unlike above, rounding W̃ᵀp would not cancel.
        """
        rows = torch.empty(dense.hidden.shape, device=dense.hidden.device)
        constant = torch.empty(len(dense.hidden), device=dense.hidden.device)
        for span, logits in dense.logits():
            log_p = torch.log_softmax(logits, dim=1)
            p = log_p.exp()
            rows[span] = p @ head.wide.weight.float()
            constant[span] = (p * log_p).sum(dim=1)
            if head.wide.bias is not None:
                constant[span] -= p @ head.wide.bias.float()
        return {"mean_row": rows, "constant": constant}

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return KL(dense ‖ compressed) of the next-token distribution at every token, in nats, fp32, shape (tokens,).

        Args:
            outputs: The compressed model's output on the tokens.
            targets: What ``targets`` returned for the same tokens of the dense model.
        """
        if outputs.head.linear:
            cross = (outputs.hidden.float() * targets["mean_row"].float()).sum(dim=1)
            return (targets["constant"] - cross) + outputs.logsumexp
        result = torch.empty(len(outputs.hidden), device=outputs.hidden.device)
        for span, logits in outputs.logits():
            log_p = torch.log_softmax((outputs.other or outputs.head).logits(targets["hidden"][span]), dim=1)
            log_q = torch.log_softmax(logits, dim=1)
            result[span] = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        return result

    def reduce(self, mean: float) -> float:
        """Return the mean KL as it is, in nats a token."""
        return mean
