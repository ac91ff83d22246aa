"""Measures more than a mean on held-out text: how bad the worst tokens are, and how often the next word changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evosweep.core.problem import Genome
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL

SHARES = {"kl_p50": 50.0, "kl_p90": 90.0, "kl_p99": 99.0, "kl_p99.9": 99.9}
DRAWS = 1000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles of its draws
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """What a model says of every token of the validation split.

    Attributes:
        first: Its most probable token, shape (windows, tokens - 1).
        right: Its probability of the token that follows in the text, the same shape.
    """

    first: npt.NDArray[np.int64]
    right: Floats


@dataclass(frozen=True)
class TokenFigures:
    """A compressed model beside the dense one, token by token, each shape (windows, tokens - 1).

    Attributes:
        kl: KL from the dense model, nats.
        flipped: Whether the most probable token is another.
        shift: By how much the probability of the right token differs.
    """

    kl: Floats
    flipped: npt.NDArray[np.bool_]
    shift: Floats


def choices(evaluator: Evaluator, genome: Genome | None) -> Choices:
    """Return what an allocation, or with None the dense model, says of every token of the validation split."""
    first = []
    right = []
    for window in evaluator.splits["validation"].windows:
        tokens = torch.from_numpy(window)
        logits = evaluator.logits(genome, tokens[None])[:-1]
        wanted = evaluator.anatomy.pictures.plain(tokens)[1:].to(logits.device, torch.long)
        first.append(logits.argmax(1).cpu().numpy())
        right.append((logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)).exp().double().cpu().numpy())
    return Choices(np.stack(first), np.stack(right))


def token_figures(evaluator: Evaluator, genome: Genome, dense: Choices) -> TokenFigures:
    """Return an allocation beside the dense model on the validation split.

    Args:
        evaluator: The model and its levels.
        genome: Level of every unit, shape (units,).
        dense: What the dense model says.
    """
    split = evaluator.splits["validation"]
    windows = range(len(split.windows))
    kl = evaluator.token_losses(genome[None], split="validation", windows=windows, fitness=[KL()])["kl"][0]
    mine = choices(evaluator, genome)
    weights = split.weights(windows, split.seq_len)
    if weights is None:
        return TokenFigures(kl.astype(np.float64), mine.first != dense.first, mine.right - dense.right)
    text = np.flatnonzero((weights > 0).all(axis=0))  # of every window, where none has an image
    kl = kl[:, text] / weights[:, text]
    return TokenFigures(
        kl.astype(np.float64), (mine.first != dense.first)[:, text], (mine.right - dense.right)[:, text]
    )


def tails(figures: TokenFigures) -> dict[str, dict[str, float]]:
    """Return percentiles of KL, share of flips and RMS shift, each with a 95 % interval.

    ``flips`` is the share of tokens whose most probable successor changes; ``rms_shift`` the root mean square of the
    change of the right token's probability, as llama.cpp's perplexity tool reports ("RMS Δp"). Intervals are
    percentiles of a bootstrap that draws whole windows, since tokens of a window are not independent; with one window
    there is none.

    Returns:
        Name -> ``value``, and ``low`` and ``high`` where there are two windows or more.
    """
    measures: Mapping[str, tuple[Floats, Callable[[Floats], float]]] = {
        "kl": (figures.kl, lambda values: float(values.mean())),
        **{name: (figures.kl, _percentile(share)) for name, share in SHARES.items()},
        "flips": (figures.flipped.astype(np.float64), lambda values: float(values.mean())),
        "rms_shift": (figures.shift, lambda values: float(np.sqrt(np.square(values).mean()))),
    }
    windows = len(figures.kl)
    drawn = generator(0, "bootstrap").integers(windows, size=(DRAWS, windows))
    result = {}
    for name, (values, measure) in measures.items():
        result[name] = {"value": measure(values)}
        if windows > 1:
            low, high = np.percentile([measure(values[rows]) for rows in drawn], INTERVAL)
            result[name] |= {"low": float(low), "high": float(high)}
    return result


def _percentile(share: float) -> Callable[[Floats], float]:
    return lambda values: float(np.percentile(values, share))
