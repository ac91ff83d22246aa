"""Kullback-Leibler divergence from the dense model, over the whole vocabulary."""

from collections.abc import Mapping

import torch

from evosweep.fitness.base import Outputs


class KL:
    """KL(dense ‖ compressed) in nats per token, exact, in memory of hidden size.

    With p the dense model's next-token distribution, W the linear head and h the compressed model's hidden
    state, KL = Σ p·log p − h·(Wᵀp) − p·bias + logsumexp(W h + bias). Only Wᵀp and the two sums are kept of the
    dense model. A head that is not linear keeps the dense hidden state and forms both logits in chunks.
    """

    name = "kl"

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return ``mean_row`` (tokens, hidden) and ``constant`` (tokens,), or ``hidden`` for the general path."""
        head = dense.head
        if not head.linear:
            return {"hidden": dense.hidden}
        # A model in half precision gets its rows in fp16: 11 bits of them are more than it has itself.
        width = torch.float32 if dense.hidden.dtype is torch.float32 else torch.float16
        rows = torch.empty(dense.hidden.shape, device=dense.hidden.device, dtype=width)
        constant = torch.empty(len(dense.hidden), device=dense.hidden.device)
        for span, logits in dense.logits():
            log_p = torch.log_softmax(logits, dim=1)
            p = log_p.exp()
            rows[span] = (p @ head.weight.float()).to(width)
            constant[span] = (p * log_p).sum(dim=1)
            if head.bias is not None:
                constant[span] -= p @ head.bias.float()
        return {"mean_row": rows, "constant": constant}

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the divergence of every token."""
        if outputs.head.linear:
            cross = (outputs.hidden.float() * targets["mean_row"].float()).sum(dim=1)
            return targets["constant"] - cross + outputs.logsumexp
        result = torch.empty(len(outputs.hidden), device=outputs.hidden.device)
        for span, logits in outputs.logits():
            log_p = torch.log_softmax(outputs.head.logits(targets["hidden"][span]), dim=1)
            log_q = torch.log_softmax(logits, dim=1)
            result[span] = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        return result

    def reduce(self, mean: float) -> float:
        """Return the mean."""
        return mean
