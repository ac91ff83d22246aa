"""Racing: stop scoring candidates that a sequential paired test already excludes.

Candidates of a stage see the same tokens, so their differences vary far less than their losses do. After every look at
some of the tokens each candidate is compared, by a one-sided paired t test, with the one that would survive last. All
looks have one boundary, chosen so that the error level holds for them together (Pocock's group sequential test, 1977):
what a look sees the next one sees again, so that sharing the level out among them would be far too careful. In the
spirit of Maron and Moore's Hoeffding races (1994) and Birattari's F-Race (2002).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_number

Floats = npt.NDArray[np.floating]
SEGMENT = 32  # tokens whose mean loss is one sample: neighbours' losses are alike
LEAST_SEGMENTS = 8  # of a first look into a window
GRID, REACH, HALVINGS = 301, 8.0, 40  # how finely, how many deviations far, and how exactly boundaries are computed


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
        error: Probability, for a candidate as good as the last survivor, to be given up before a stage's end.
    """

    error: float

    def __post_init__(self) -> None:
        check_number("racing", self.error, low=0, high=0.5, exclusive=True)

    def looks(self, windows: int, seq_len: int) -> list[Look]:
        """Return the looks of a stage: into a quarter of the first window, then after 1, 2, 4 ... windows."""
        first = [Look(1, seq_len // 4)] if seq_len // 4 > SEGMENT * LEAST_SEGMENTS else []
        doubling = [Look(2**power, seq_len) for power in range((windows - 1).bit_length())]
        return [*first, *doubling, Look(windows, seq_len)]

    def boundary(self, looks: Sequence[Look]) -> float:
        """Return how many standard errors behind a candidate is given up, at every look but the last.

        After the last look everything is scored, and nobody can be given up any more.
        """
        seen = [look.windows * look.length for look in looks]
        return pocock(tuple(tokens / seen[-1] for tokens in seen[:-1]), self.error) if len(seen) > 1 else np.inf

    @staticmethod
    def excluded(losses: Floats, survivors: int, *, boundary: float) -> npt.NDArray[np.bool_]:
        """Return who need not be scored further, shape (candidates,).

        Args:
            losses: Of tokens that all candidates were scored on, shape (candidates, windows, tokens).
            survivors: How many go on from this stage.
            boundary: As for a normal score; few segments ask for more.
        """
        samples = segments(losses)
        order = np.argsort(samples.mean(axis=1), kind="stable")
        out = np.zeros(len(samples), dtype=bool)
        if len(samples) <= survivors or samples.shape[1] < 2 or np.isinf(boundary):
            return out
        behind = order[survivors:]
        gaps = samples[behind] - samples[order[survivors - 1]]
        spread = np.maximum(gaps.std(axis=1, ddof=1), np.finfo(float).tiny)
        score = gaps.mean(axis=1) / spread * np.sqrt(gaps.shape[1])
        out[behind] = score > students(boundary, gaps.shape[1] - 1)
        return out


@functools.lru_cache(maxsize=64)
def pocock(fractions: tuple[float, ...], error: float) -> float:
    """Return z such that a Brownian motion's score is above z at any of some looks with probability ``error``.

    Args:
        fractions: When it is looked at, rising.
        error: Above 0 and at most 0.5.
    """
    low, high = -1.0, NormalDist().inv_cdf(1 - error / len(fractions))  # Bonferroni's is never too low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _crossing(fractions, middle) > error else (low, middle)
    return high


def _crossing(fractions: Sequence[float], z: float) -> float:
    """Return the probability of a score above z at some look, by recursive integration (Armitage et al., 1969)."""
    places, density, before = np.zeros(1), np.ones(1), 0.0  # of those not above z yet
    for fraction in fractions:
        reached = np.linspace(-REACH * fraction**0.5, z * fraction**0.5, GRID)
        spread = (fraction - before) ** 0.5
        steps = np.exp(-0.5 * ((reached[:, None] - places) / spread) ** 2) / (spread * (2 * np.pi) ** 0.5)
        weights = np.full(GRID, reached[1] - reached[0])
        weights[[0, -1]] /= 2
        places, density, before = reached, weights * (steps @ density), fraction
    return 1.0 - float(density.sum())


def students(z: float, degrees: int) -> float:
    """Return the quantile of Student's t where the normal's is z (Abramowitz and Stegun, 26.7.5)."""
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def segments(losses: Floats) -> npt.NDArray[np.float64]:
    """Return mean losses of segments, shape (candidates, segments); a window's last few tokens count in none."""
    size = min(SEGMENT, losses.shape[2])
    count = losses.shape[2] // size
    cut = losses[:, :, : count * size].astype(np.float64).reshape(*losses.shape[:2], count, size)
    return cut.mean(axis=3).reshape(len(losses), -1)
