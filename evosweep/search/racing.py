"""Racing: stop scoring candidates that a sequential paired test already excludes.

Candidates of a stage see the same tokens, so their differences vary far less than their losses do. After every look at
some of the tokens each candidate is compared, by a one-sided paired t test, with the one that would survive last; the
error level is shared out among the looks. In the spirit of Maron and Moore's Hoeffding races (1994) and Birattari's
F-Race (2002).
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_number

Floats = npt.NDArray[np.floating]
SEGMENT = 32  # tokens whose mean loss is one sample: neighbours' losses are alike
LEAST_SEGMENTS = 8  # of a first look into a window


@dataclass(frozen=True)
class Look:
    """When the race is looked at: after so many windows, of which only the first ``length`` tokens."""

    windows: int
    length: int


@dataclass(frozen=True)
class Raced:
    """A stage's outcome.

    Attributes:
        scores: Fitness of each candidate, shape (candidates,); of those given up, on what they were scored on.
        out: Who was given up, shape (candidates,).
        tokens: Tokens scored, candidates times tokens.
    """

    scores: npt.NDArray[np.float64]
    out: npt.NDArray[np.bool_]
    tokens: int


@dataclass(frozen=True)
class Racing:
    """When to give a candidate up.

    Args:
        error: Probability, for a candidate that belongs among the survivors, to be given up in a stage.
    """

    error: float

    def __post_init__(self) -> None:
        check_number("search.racing", self.error, low=0, high=0.5, exclusive=True)

    def looks(self, windows: int, seq_len: int) -> list[Look]:
        """Return the looks of a stage: into a quarter of the first window, then after 1, 2, 4 ... windows."""
        first = [Look(1, seq_len // 4)] if seq_len // 4 > SEGMENT * LEAST_SEGMENTS else []
        doubling = [Look(2**power, seq_len) for power in range((windows - 1).bit_length())]
        return [*first, *doubling, Look(windows, seq_len)]

    def excluded(self, losses: Floats, survivors: int, *, looks: int) -> npt.NDArray[np.bool_]:
        """Return who need not be scored further, shape (candidates,).

        Args:
            losses: Of tokens that all candidates were scored on, shape (candidates, windows, tokens).
            survivors: How many go on from this stage.
            looks: Looks in all, among which the error is shared out.
        """
        samples = segments(losses)
        order = np.argsort(samples.mean(axis=1), kind="stable")
        out = np.zeros(len(samples), dtype=bool)
        if len(samples) <= survivors or samples.shape[1] < 2:
            return out
        behind = order[survivors:]
        gaps = samples[behind] - samples[order[survivors - 1]]
        spread = np.maximum(gaps.std(axis=1, ddof=1), np.finfo(float).tiny)
        score = gaps.mean(axis=1) / spread * np.sqrt(gaps.shape[1])
        out[behind] = score > t_quantile(1 - self.error / looks, gaps.shape[1] - 1)
        return out


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t by its expansion around the normal's (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def segments(losses: Floats) -> npt.NDArray[np.float64]:
    """Return mean losses of segments, shape (candidates, segments); a window's last few tokens count in none."""
    size = min(SEGMENT, losses.shape[2])
    count = losses.shape[2] // size
    cut = losses[:, :, : count * size].astype(np.float64).reshape(*losses.shape[:2], count, size)
    return cut.mean(axis=3).reshape(len(losses), -1)
