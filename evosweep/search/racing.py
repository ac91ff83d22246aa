"""Racing: stop scoring candidates that a sequential paired test already excludes.

Candidates of a stage see the same tokens, so their differences vary far less than their losses do. A stage with k
survivors is looked at several times while its tokens are scored. At each look, a candidate is given up if at least k
competitors are significantly better than it by paired t tests.

One boundary serves all looks and all competitors, and the error level holds for them together. It is the quantile of
what a candidate meets in a field of n equals: the k-th largest of its n - 1 test statistics, the largest over all
looks. Looks see each other's tokens (Pocock's group sequential test, Biometrika 1977, which it is for n = 2), and the
statistics share the candidate's own noise, so they correlate by 1/2 (as in subset selection: Gupta, Technometrics 1965,
which it is for k = 1 and one look). In the spirit of Hoeffding races (Maron and Moore, 1994) and F-Race (Birattari et
al., 2002).
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
ALIKE = 0.03  # correlation of a window's segments, measured: KL of 3-bit SmolLM2 mutants on Wikipedia, 1024 tokens
LEAST_SEGMENTS = 8  # of a first look into a window
GRID = 301  # points of the numerical integration that boundaries are computed with
REACH = 8.0  # its range, in standard deviations
HALVINGS = 40  # bisections for a boundary
FIELDS = 4_000  # simulated fields that a boundary is read from: the error level is then true to about 0.006
STEP = 8  # numbers of competitors are rounded up to multiples of it, which is never too low


@dataclass(frozen=True)
class Look:
    """An interim look of a race: after ``windows`` windows, of which only the first ``length`` tokens are scored."""

    windows: int
    length: int


@dataclass(frozen=True)
class Racing:
    """The rule by which a race stops scoring a candidate.

    Promised: in a field of equally good candidates each is given up before the stage's end with probability ``error``,
    all looks and all competitors taken together. Where candidates differ (evenly, or normally about their mean), one
    that truly belongs to the survivors is given up more rarely than that, the last of them included.

    Not promised: that it is so in any field. Where some are far ahead and all others are tied, chance decides which of
    the tied ones takes the last place; one as good as the others does. A pair's differences on segments of 32 tokens
    are taken as independent between windows and as correlated by 0.03 within one, which is what was measured.

    Args:
        error: Above 0 and at most 0.5.

    Raises:
        SettingError: ``error`` is no such number.
    """

    error: float

    def __post_init__(self) -> None:
        check_number("racing", self.error, low=0, high=0.5, exclusive=True)

    def looks(self, windows: int, seq_len: int) -> list[Look]:
        """Return the looks of a stage: after 1, 2, 4 ... windows; into a quarter of the window if it is the only one.

        That quarter is scored again with the whole, so a stage of several windows, with looks enough, goes without.
        """
        first = [Look(1, seq_len // 4)] if windows == 1 and seq_len // 4 > SEGMENT * LEAST_SEGMENTS else []
        doubling = [Look(2**power, seq_len) for power in range((windows - 1).bit_length())]
        return [*first, *doubling, Look(windows, seq_len)]

    def boundary(self, looks: Sequence[Look], *, candidates: int = 2, survivors: int = 1) -> float:
        """Return how many standard errors apart two candidates differ significantly, at every look but the last.

        After the last look everything is scored, and nobody can be given up any more.

        Args:
            looks: Of the stage.
            candidates: How many compete, n.
            survivors: How many of them go on, k.
        """
        seen = [look.windows * look.length for look in looks]
        if len(seen) < 2 or candidates <= survivors:
            return np.inf
        fractions = tuple(tokens / seen[-1] for tokens in seen[:-1])
        return field_boundary(fractions, self.error, competitors=candidates - 1, survivors=survivors)

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
        scores = paired_scores(samples, per_window=count // losses.shape[1])
        kth_largest = np.sort(scores, axis=1)[:, -survivors]
        return np.asarray(kth_largest > students(boundary, count - 1))


def paired_scores(samples: npt.NDArray[np.float64], *, per_window: int = 1) -> npt.NDArray[np.float64]:
    """Return the paired t statistic of every candidate against every other, shape (candidates, candidates).

    Args:
        samples: Losses on the same segments, shape (candidates, segments).
        per_window: How many of the segments are of one window, which are alike.

    Returns:
        In row i and column j, how many standard errors the mean loss of i is above that of j; 0 on the diagonal.
    """
    count = samples.shape[1]
    means = samples.mean(axis=1)
    centred = samples - means[:, None]
    centred -= centred.mean(axis=0)  # what all share, which is most of it, would cancel with a loss of digits
    products = centred @ centred.T / (count - 1)
    variances = np.diag(products)[:, None] + np.diag(products) - 2 * products
    inflation = 1 + (per_window - 1) * ALIKE  # the design effect of cluster sampling (Kish, 1965)
    errors = np.sqrt(np.maximum(variances, np.finfo(float).tiny) / count * inflation)
    return np.asarray((means[:, None] - means) / errors)


def field_boundary(fractions: tuple[float, ...], error: float, *, competitors: int, survivors: int) -> float:
    """Return z such that a candidate falls z standard errors behind k equals at any look with probability ``error``.

    Args:
        fractions: Shares of the tokens at which the race is looked at, rising.
        error: Above 0 and at most 0.5.
        competitors: Other candidates, n - 1.
        survivors: How many of the field go on, k, at most ``competitors``.
    """
    if competitors == 1:
        return pocock(fractions, error)
    if competitors > STEP:
        competitors = -(-competitors // STEP) * STEP
    return float(np.quantile(_worst_scores(fractions, competitors, survivors), 1 - error))


@functools.lru_cache(maxsize=128)
def _worst_scores(fractions: tuple[float, ...], competitors: int, survivors: int) -> npt.NDArray[np.float32]:
    """Return the largest k-th largest statistic over all looks in simulated fields of equals, shape (fields,).

    Losses add up as Brownian motions of one variance; fractions, competitors and survivors as in ``field_boundary``.
    """
    rng = generator(0, "racing", competitors, survivors, *map(str, fractions))
    steps = np.sqrt(np.diff((0.0, *fractions))).astype(np.float32)
    candidate, others = (
        np.cumsum(rng.standard_normal((FIELDS, count, len(steps)), dtype=np.float32) * steps, axis=2)
        for count in (1, competitors)
    )
    scores = (candidate - others) / np.sqrt(2 * np.array(fractions, dtype=np.float32))
    kth_largest = np.partition(scores, competitors - survivors, axis=1)[:, competitors - survivors]
    return np.asarray(kth_largest.max(axis=1))


@functools.lru_cache(maxsize=64)
def pocock(fractions: tuple[float, ...], error: float) -> float:
    """Return z such that a Brownian motion's score is above z at any of some looks with probability ``error``.

    Args:
        fractions: Shares of the tokens at which it is looked at, rising.
        error: Above 0 and at most 0.5.
    """
    low = -1.0
    high = NormalDist().inv_cdf(1 - error / len(fractions))  # Bonferroni's is never too low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _crossing(fractions, middle) > error else (low, middle)
    return high


def _crossing(fractions: Sequence[float], z: float) -> float:
    """Return the probability of a score above z at some look, by recursive integration (Armitage et al., 1969)."""
    points = np.zeros(1)
    density = np.ones(1)  # of the scores that are not above z yet
    before = 0.0
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
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
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
