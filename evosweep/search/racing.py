"""Racing: stop scoring candidates that a sequential paired test already excludes.

Candidates of a stage see the same tokens, so their differences vary far less than their losses do. A stage with k
survivors is looked at several times while its tokens are scored. At each look, a candidate is given up if at least k
competitors are significantly better than it by paired t tests. One boundary serves all looks and all competitors, and
the error level holds for them together:

* A candidate that belongs to the true best k has at most k - 1 competitors that are truly better. If k are found
  significantly better, at least one of the other n - k was found so wrongly. It is therefore enough to bound the
  largest of n - k test statistics, in the least favourable case: the k - 1 better ones far ahead, all others equal.
  This is subset selection (Gupta, Technometrics 1965; for the k best, Koenig and Law, 1985).
* Looks see each other's tokens, so all have one boundary (Pocock's group sequential test, Biometrika 1977), and the
  tests share the candidate's own noise, so they correlate by 1/2. The boundary is the quantile of the largest statistic
  over looks and competitors in such a field; for one competitor it is Pocock's.

In the spirit of Hoeffding races (Maron and Moore, 1994) and F-Race (Birattari et al., 2002).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_number
from evosweep.core.seeds import generator

Floats = npt.NDArray[np.floating]
SEGMENT = 32  # tokens whose mean loss is one sample: neighbours' losses are alike
LEAST_SEGMENTS = 8  # of a first look into a window
GRID, REACH, HALVINGS = 301, 8.0, 40  # points, standard deviations and bisections that boundaries are computed with
FIELDS = 10_000  # simulated fields that a boundary for many competitors is read from


@dataclass(frozen=True)
class Look:
    """When a race is looked at: after ``windows`` windows, of which only the first ``length`` tokens are scored."""

    windows: int
    length: int


@dataclass(frozen=True)
class Racing:
    """When to give a candidate up.

    Promised: a candidate that truly belongs to a stage's survivors is given up before the stage's end with probability
    ``error`` at most, however many competitors it has and whatever they score. Where the field is spread out, as it
    usually is, it happens much more rarely. It is a promise for each survivor, not for all of them at once, and it
    takes the differences between two candidates as equally noisy and as independent from one segment of 32 tokens to
    the next.

    Args:
        error: Above 0 and at most 0.5.

    Raises:
        SettingError: ``error`` is no such number.
    """

    error: float

    def __post_init__(self) -> None:
        check_number("racing", self.error, low=0, high=0.5, exclusive=True)

    def looks(self, windows: int, seq_len: int) -> list[Look]:
        """Return the looks of a stage: into a quarter of the first window, then after 1, 2, 4 ... windows."""
        first = [Look(1, seq_len // 4)] if seq_len // 4 > SEGMENT * LEAST_SEGMENTS else []
        doubling = [Look(2**power, seq_len) for power in range((windows - 1).bit_length())]
        return [*first, *doubling, Look(windows, seq_len)]

    def boundary(self, looks: Sequence[Look], *, competitors: int = 1) -> float:
        """Return how many standard errors apart two candidates differ significantly, at every look but the last.

        After the last look everything is scored, and nobody can be given up any more.

        Args:
            looks: Of the stage.
            competitors: Candidates of the stage beyond its survivors, n - k.
        """
        seen = [look.windows * look.length for look in looks]
        if len(seen) < 2:
            return np.inf
        fractions = tuple(tokens / seen[-1] for tokens in seen[:-1])
        return field_boundary(fractions, self.error, max(competitors, 1))

    @staticmethod
    def excluded(losses: Floats, survivors: int, *, boundary: float) -> npt.NDArray[np.bool_]:
        """Return which candidates need not be scored further, shape (candidates,).

        Args:
            losses: Of tokens that all candidates were scored on, shape (candidates, windows, tokens).
            survivors: How many go on from this stage, k.
            boundary: In standard errors, for a normal score; the fewer segments, the more is asked for.
        """
        samples = segments(losses)
        candidates, count = samples.shape
        if candidates <= survivors or count < 2 or np.isinf(boundary):
            return np.zeros(candidates, dtype=bool)
        scores = paired_scores(samples)
        kth_largest = np.sort(scores, axis=1)[:, -survivors]
        return np.asarray(kth_largest > students(boundary, count - 1))


def paired_scores(samples: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the paired t statistic of every candidate against every other, shape (candidates, candidates).

    Args:
        samples: Losses on the same segments, shape (candidates, segments).

    Returns:
        In row i and column j, how many standard errors the mean loss of i is above that of j; 0 on the diagonal.
    """
    count = samples.shape[1]
    means = samples.mean(axis=1)
    centred = samples - means[:, None]
    centred -= centred.mean(axis=0)  # what all share, which is most of it, would cancel with a loss of digits
    products = centred @ centred.T / (count - 1)
    variances = np.diag(products)[:, None] + np.diag(products) - 2 * products
    errors = np.sqrt(np.maximum(variances, np.finfo(float).tiny) / count)
    return np.asarray((means[:, None] - means) / errors)


@functools.lru_cache(maxsize=256)
def field_boundary(fractions: tuple[float, ...], error: float, competitors: int) -> float:
    """Return z such that any competitor at any look seems z standard errors better with probability ``error``.

    Candidate and competitors are equally good: independent Brownian motions of one variance, compared pair by pair.

    Args:
        fractions: Shares of the tokens at which the race is looked at, rising.
        error: Above 0 and at most 0.5.
        competitors: At least 1.
    """
    if competitors == 1:
        return pocock(fractions, error)
    largest = _largest_scores(fractions, 1 << (competitors - 1).bit_length())[competitors - 1]
    return float(np.quantile(largest, 1 - error))


@functools.lru_cache(maxsize=8)
def _largest_scores(fractions: tuple[float, ...], competitors: int) -> npt.NDArray[np.float32]:
    """Return the largest statistic over all looks in simulated fields of 1, 2, ... competitors.

    Returns:
        Shape (competitors, fields).
    """
    rng = generator(0, "racing", competitors, *map(str, fractions))
    steps = np.sqrt(np.diff((0.0, *fractions))).astype(np.float32)
    scale = np.sqrt(2 * np.array(fractions, dtype=np.float32))

    def paths() -> npt.NDArray[np.float32]:
        return np.cumsum(rng.standard_normal((FIELDS, len(steps)), dtype=np.float32) * steps, axis=1)

    own = paths()
    largest = np.empty((competitors, FIELDS), dtype=np.float32)
    for index in range(competitors):
        largest[index] = ((own - paths()) / scale).max(axis=1)
    return np.maximum.accumulate(largest, axis=0)


@functools.lru_cache(maxsize=64)
def pocock(fractions: tuple[float, ...], error: float) -> float:
    """Return z such that a Brownian motion's score is above z at any of some looks with probability ``error``.

    Args:
        fractions: Shares of the tokens at which it is looked at, rising.
        error: Above 0 and at most 0.5.
    """
    low, high = -1.0, NormalDist().inv_cdf(1 - error / len(fractions))  # Bonferroni's is never too low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _crossing(fractions, middle) > error else (low, middle)
    return high


def _crossing(fractions: Sequence[float], z: float) -> float:
    """Return the probability of a score above z at some look, by recursive integration (Armitage et al., 1969)."""
    points, density, before = np.zeros(1), np.ones(1), 0.0  # of those not above z yet
    for fraction in fractions:
        reached = np.linspace(-REACH * fraction**0.5, z * fraction**0.5, GRID)
        spread = (fraction - before) ** 0.5
        steps = np.exp(-0.5 * ((reached[:, None] - points) / spread) ** 2) / (spread * (2 * np.pi) ** 0.5)
        weights = np.full(GRID, reached[1] - reached[0])
        weights[[0, -1]] /= 2
        points, density, before = reached, weights * (steps @ density), fraction
    return 1.0 - float(density.sum())


def students(z: float, degrees: int) -> float:
    """Return the quantile of Student's t where the normal's is z (Abramowitz and Stegun, 26.7.5)."""
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def segments(losses: Floats) -> npt.NDArray[np.float64]:
    """Return mean losses of segments, shape (candidates, segments); a window's last few tokens count in none.

    Args:
        losses: Shape (candidates, windows, tokens).
    """
    size = min(SEGMENT, losses.shape[2])
    count = losses.shape[2] // size
    cut = losses[:, :, : count * size].astype(np.float64).reshape(*losses.shape[:2], count, size)
    return cut.mean(axis=3).reshape(len(losses), -1)
