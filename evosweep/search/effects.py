"""Estimates of what single moves do to the loss: paired differences, shrunk towards what moves like them do."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Problem
from evosweep.search.moves_table import Floats, MoveTable
from evosweep.search.racing import ALIKE, segments

PRIOR_DEGREES = 4.0  # degrees of freedom that the spread of similar moves counts for in a move's own spread
NEVER_EQUAL = 0.1  # of the spread that is seen, what is at least taken as real
OWN_GROUP = 8  # moves from one level that are a group of their own
LEAST_GROUP = 4  # moves of a group that has a mean of its own
EXACT = 1e-12  # least variance, as a share of the largest square: a loss without noise is known only so well


@dataclass(frozen=True)
class Measured:
    """Sums over segments of tokens of the paired differences between a move and its base.

    Attributes:
        count: Segments, shape (moves,).
        total: Sum of the differences, shape (moves,).
        square: Sum of their squares, shape (moves,).
        per_window: Segments of one window, whose differences are alike.
    """

    count: Floats
    total: Floats
    square: Floats
    per_window: int = 1

    @classmethod
    def none(cls, moves: int) -> "Measured":
        """Return the sums of moves that were not measured."""
        return cls(np.zeros(moves), np.zeros(moves), np.zeros(moves))

    def adding(self, moves: npt.NDArray[np.int64], losses: npt.NDArray[np.floating]) -> "Measured":
        """Return the sums with further losses.

        Args:
            moves: Indices of the moves that were scored.
            losses: Of the base, then of each of them, on the same tokens, shape (1 + moves, windows, tokens).
        """
        samples = segments(losses)
        differences = samples[1:] - samples[0]
        count = self.count.copy()
        total = self.total.copy()
        square = self.square.copy()
        count[moves] += differences.shape[1]
        total[moves] += differences.sum(axis=1)
        square[moves] += np.square(differences).sum(axis=1)
        return replace(
            self, count=count, total=total, square=square, per_window=differences.shape[1] // losses.shape[1]
        )

    def means(self, groups: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return each move's mean difference and the variance of that mean; of moves not measured, 0 and infinity.

        A variance from few segments is itself uncertain, so it is drawn towards that of the group (as in limma: Smyth,
        2004); segments of one window are alike, which raises it (Kish's design effect).

        Args:
            groups: Index of each move's group, shape (moves,).
        """
        known = self.count > 1
        count = np.where(known, self.count, 2.0)
        means = np.where(known, self.total / count, 0.0)
        within = np.maximum(self.square - count * means**2, 0.0)
        degrees = np.where(known, count - 1, 0.0)
        pooled = np.bincount(groups, within * known) / np.maximum(np.bincount(groups, degrees), 1.0)
        spread = (within * known + PRIOR_DEGREES * pooled[groups]) / (degrees + PRIOR_DEGREES)
        inflation = 1 + (self.per_window - 1) * ALIKE
        floor = EXACT * float(np.square(means).max(initial=0.0)) + np.finfo(np.float32).tiny
        return means, np.where(known, np.maximum(spread / count * inflation, floor), np.inf)


def groups_of(problem: Problem, table: MoveTable) -> npt.NDArray[np.int64]:
    """Return the index of each move's group: units of one kind, from one level in one direction; shape (moves,).

    Groups of fewer than eight moves are joined over levels.
    """
    coarse = problem.kinds[table.units] * 3 + table.directions + 1
    fine = coarse * problem.costs.shape[1] + table.base[table.units]
    few = np.bincount(fine)[fine] < OWN_GROUP
    keys = np.where(few, coarse, fine + 1 + coarse.max(initial=0))
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class Estimates:
    """What is believed of every move of a table: a normal distribution of its effect on the loss.

    Attributes:
        mean: Shape (moves,).
        variance: Shape (moves,).
    """

    mean: Floats
    variance: Floats


def shrunk(
    means: Floats, variances: Floats, groups: npt.NDArray[np.int64], directions: npt.NDArray[np.int64]
) -> Estimates:
    """Return empirical-Bayes estimates: each mean is drawn towards its group's, the more the noisier it is.

    In a group, effects are taken as normal around a common mean with variance τ², both by moments; the estimate is
    the posterior mean (Efron and Morris, 1975). Groups with fewer than four measured moves share one for each
    direction.

    Args:
        means: Measured effects, shape (moves,).
        variances: Of these, infinite where nothing was measured, shape (moves,).
        groups: Index of each move's group, shape (moves,).
        directions: Of the moves, -1, 0 or 1, shape (moves,).
    """
    known = np.isfinite(variances)
    small = np.bincount(groups, known)[groups] < LEAST_GROUP
    pools = np.where(small, groups.max(initial=0) + 2 + directions, groups)
    mean = np.zeros(len(means))
    variance = np.ones(len(means))
    for pool in np.unique(pools):
        members = np.flatnonzero(pools == pool)
        centre, spread = _moments(means[members], variances[members])
        precision = 1 / variances[members]
        prior = 1 / spread
        mean[members] = (prior * centre + precision * means[members]) / (prior + precision)
        variance[members] = 1 / (prior + precision)
    return Estimates(mean, variance)


def _moments(means: Floats, variances: Floats) -> tuple[float, float]:
    """Return the common mean of effects and their variance around it, from measurements with known variances.

    All count alike (Hedges and Olkin, 1985): larger effects are noisier, so that weights by precision would draw the
    mean towards 0 and hide the spread.
    """
    known = np.isfinite(variances)
    if not known.any():
        return 0.0, 1.0
    noise = float(variances[known].mean())
    seen = float(means[known].var(ddof=1)) if known.sum() > 1 else noise
    return float(means[known].mean()), max(seen - noise, NEVER_EQUAL * max(seen, noise))
