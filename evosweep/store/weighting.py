"""How calibration tokens are weighted in the second moment: by the norm of their input, by the attention they receive.

A weighting is one entry of ``WEIGHTINGS``: what a token's input is divided by, and what its x xᵀ is multiplied with.
Both look at one window at a time, so that nothing depends on how windows are put into batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST_NORM = 1e-12
LEAST_IMPORTANCE = 0.005  # RSQ's r_min, beside r_max = 1
ByToken = Callable[[torch.Tensor], torch.Tensor]
"""From one number a token to another, both of shape (windows, tokens)."""


@dataclass(frozen=True)
class Weighting:
    """What makes a token's weight w in the second moment, mean of w·x xᵀ.

    Attributes:
        divisor: From the norms ‖x‖ to what the inputs are divided by; None: 1. It makes a factor divisor⁻² of w.
        importance: From the attention that tokens receive in the block to a factor of w; None: attention is not read.
        across: Whether the divisor compares a window's tokens.
    """

    divisor: ByToken | None = None
    importance: ByToken | None = None
    across: bool = False

    @property
    def by_window(self) -> bool:
        """Whether a token's weight depends on its window, so that whole windows are needed."""
        return self.across or self.importance is not None


def concentration(received: torch.Tensor) -> torch.Tensor:
    """Return RSQ's attention concentration, with mean 1 in every window (Sung et al., arXiv 2503.01820).

    A window's sums over heads and queries are scaled to [0.005, 1]. In H = 2·X·R²·Xᵀ the published code takes the
    scaled value r, over its mean in the window, for a token's entry of R²; so does this.

    Args:
        received: Attention that each token receives, summed over heads and queries.
    """
    low = received.amin(dim=1, keepdim=True)
    reach = (received.amax(dim=1, keepdim=True) - low).clamp(min=LEAST_NORM)
    scaled = LEAST_IMPORTANCE + (received - low) / reach * (1 - LEAST_IMPORTANCE)
    return scaled / scaled.mean(dim=1, keepdim=True)


def norm(norms: torch.Tensor) -> torch.Tensor:
    """Return the norms themselves: every token's relative error counts alike."""
    return norms


def root(norms: torch.Tensor) -> torch.Tensor:
    """Return the square roots of the norms, half-way between plain and relative."""
    return norms.sqrt()


def clipped(norms: torch.Tensor) -> torch.Tensor:
    """Return the norms, those below their window's median raised to it: large inputs count alike, small ones less."""
    return torch.maximum(norms, norms.median(dim=1, keepdim=True).values)


WEIGHTINGS: Mapping[str, Weighting] = {
    "relative": Weighting(divisor=norm),
    "plain": Weighting(),
    "root": Weighting(divisor=root),
    "clipped": Weighting(divisor=clipped, across=True),
    "attention": Weighting(importance=concentration),
    "relative_attention": Weighting(divisor=norm, importance=concentration),
}
