"""Losses of windows that hold an image: none on the image's tokens, and of a whole window where a part is wanted."""

from collections.abc import Callable
from dataclasses import replace

from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.shared import Losses, Wanted


def on_text(wanted: Wanted, split: TokenSplit, losses: Callable[[Wanted], Losses]) -> Losses:
    """Return losses by fitness, shape (genomes, windows, tokens - 1), weighted so that their mean is one over text.

    Args:
        wanted: What is computed.
        split: Where its windows are.
        losses: Computes the losses on all tokens.
    """
    length = wanted.length or split.seq_len
    weights = split.weights([int(window) for window in wanted.windows], length)
    if weights is None:
        return losses(wanted)
    whole = losses(replace(wanted, length=None))  # an image cannot be cut
    return {name: values[..., : length - 1] * weights for name, values in whole.items()}
