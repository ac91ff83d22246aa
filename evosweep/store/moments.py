"""What calibration measures of a block: second moments of its inputs, outliers, the error a level makes."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from evosweep.allocators.owl import MULTIPLES
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import tf32
from evosweep.store import shard

LEAST_NORM = 1e-12
GRAM_COLUMNS = {"cpu": 192}  # so many columns of the (symmetric) Gram matrix at a time, down to the diagonal


@dataclass
class Moments:
    """What calibration remembers of one shared input X: sums while it is filled, then their ``mean()``.

    Attributes:
        gram: w·x xᵀ, shape (in, in); the second moment that compressors see. While it is filled, only what stands
            on and above the diagonal counts.
        square: x_j², shape (in,); what OWL's ‖X_j‖₂ is made of.
        tokens: Tokens seen.
    """

    gram: torch.Tensor
    square: torch.Tensor
    tokens: int = 0

    def add(self, inputs: torch.Tensor, *, weighting: str) -> None:
        """Count inputs of shape (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        squares = rows.square()
        self.square += squares.sum(dim=0)
        self.tokens += len(rows)
        if weighting == "relative":
            rows = rows / squares.sum(dim=1, keepdim=True).sqrt_().clamp_(min=LEAST_NORM)
        with tf32(allowed=True):  # both factors round alike, so that the sum stays positive definite
            for start in range(0, width := rows.shape[1], step := GRAM_COLUMNS.get(rows.device.type, width)):
                columns = slice(start, min(start + step, width))
                self.gram[: columns.stop, columns].addmm_(rows[:, : columns.stop].T, rows[:, columns])

    def mean(self) -> "Moments":
        """Return the means over all processes' tokens, the Gram matrix whole."""
        tokens = torch.tensor([self.tokens], device=self.gram.device)
        shard.add_up(self.gram, self.square, tokens)
        gram = (self.gram.triu() + self.gram.triu(1).T) / int(tokens)
        return Moments(gram, self.square / int(tokens), int(tokens))


class _Seen(Exception):
    """Ends a block's pass: what follows measures nothing more."""


def moments_of(anatomy: Anatomy, block: int, hidden: Sequence[torch.Tensor], weighting: str) -> dict[str, Moments]:
    """Return the moments of each shared input of a block, by group name."""
    leaders = [site for site in anatomy.sites_of(block) if site.group == site.name]
    found: dict[str, Moments] = {}

    def hook(group: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        width, device = args[0].shape[-1], args[0].device
        if group not in found:
            found[group] = Moments(torch.zeros((width, width), device=device), torch.zeros(width, device=device))
        found[group].add(args[0], weighting=weighting)
        if group == leaders[-1].name:
            raise _Seen

    handles = [site.module.register_forward_pre_hook(partial(hook, site.group)) for site in leaders]
    try:
        for batch in hidden:
            with suppress(_Seen):
                anatomy.run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {group: moments.mean() for group, moments in found.items()}


def outlier_ratios(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Return each layer's share of outlier weights, for several multiples M.

    A weight is an outlier if |W_ij|·‖X_j‖₂ is above M times the mean over the whole block, so that the
    numel-weighted mean over a block's layers is OWL's D_b (arXiv 2310.05175, section 4).

    Args:
        layers: Name -> (weight (out, in), mean square of each input (in,)) of all linear layers of one block.
    """
    scores = {name: weight.float().abs() * square.sqrt() for name, (weight, square) in layers.items()}
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores.values()) / sum(
        score.numel() for score in scores.values()
    )
    return {
        name: {f"outlier_ratio_m{multiple}": float((score > multiple * mean).float().mean()) for multiple in MULTIPLES}
        for name, score in scores.items()
    }
