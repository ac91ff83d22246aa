"""Kullback-Leibler divergence on the dense model's k most likely tokens, as other tools use it, for comparison."""

from collections.abc import Mapping

import torch

from evosweep.core.checks import check_int
from evosweep.fitness.base import Outputs


class TopKKL:
    """KL of the next token's distribution over the dense model's k likeliest tokens and "any other".

    A lower bound of the exact KL (data processing inequality). For every token, 2k + 1 numbers of the dense model are
    kept, where exact KL keeps hidden size + 1.

    Args:
        k: Number of tokens that count one by one.
    """

    def __init__(self, *, k: int = 64) -> None:
        self.k = check_int("k", k, low=1)
        self.name = f"top{self.k}_kl"  # targets are kept by name, and those of another k must not be used

    def targets(self, dense: Outputs) -> dict[str, torch.Tensor]:
        """Return ``indices`` (tokens, k) and ``log_p`` (tokens, k + 1), the last of it for any other token."""
        k = min(self.k, len(dense.head.weight) - 1)
        indices = []
        log_p = []
        for _, logits in dense.logits():
            best, best_indices = torch.log_softmax(logits, dim=1).topk(k, dim=1)
            indices.append(best_indices)
            log_p.append(torch.cat([best, _log_rest(best)], dim=1))
        return {"indices": torch.cat(indices), "log_p": torch.cat(log_p)}

    def losses(self, outputs: Outputs, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the KL over k + 1 outcomes at every token, in nats, fp32, shape (tokens,).

        Args:
            outputs: The compressed model's output on the tokens.
            targets: What ``targets`` returned for the same tokens of the dense model.
        """
        result = torch.empty(len(outputs.hidden), device=outputs.hidden.device)
        for span, logits in outputs.logits():
            found = torch.log_softmax(logits, dim=1).gather(1, targets["indices"][span])
            log_q = torch.cat([found, _log_rest(found)], dim=1)
            log_p = targets["log_p"][span]
            result[span] = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        return result

    def reduce(self, mean: float) -> float:
        """Return the mean KL as it is, in nats a token."""
        return mean


def _log_rest(log_p: torch.Tensor) -> torch.Tensor:
    """Return log(1 - Σ p), at least log(1e-7), shape (tokens, 1), for log-probabilities (tokens, k)."""
    return torch.log((1 - log_p.exp().sum(dim=1, keepdim=True)).clamp(min=1e-7))
