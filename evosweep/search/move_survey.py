"""Measures single moves around an incumbent, most where the decision about them is open, and remembers the effects."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem
from evosweep.search.effects import Estimates, Measured, groups_of, shrunk
from evosweep.search.moves_table import Floats, Indices, MoveTable, best_moves
from evosweep.search.protocols import Request, Text
from evosweep.search.racing import LEAST_SEGMENTS, SEGMENT

DRIFT = 0.1  # share of an effect's square by which its variance grows when the incumbent moves on
ROUNDS = 3  # in which the moves whose decision is open are measured further
FIRST = 0.5  # share of the tokens a move that all moves are measured on at first
MOST = 4  # times its average tokens that a move is measured on in one further round
OPEN = 0.05  # decisions that would cost less than this share of the costliest are taken as made


class Knowledge:
    """What was measured of single moves around the incumbents so far: mean and variance of each effect.

    Effects are remembered by (unit, from, to). Around another incumbent they are known less well, so their variance
    grows with every step.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[int, int, int], tuple[float, float]] = {}

    def of(self, table: MoveTable) -> tuple[Floats, Floats]:
        """Return mean and variance of the effects of a table's moves, 0 and infinity where nothing is known."""
        found = []
        for unit, level in zip(table.units.tolist(), table.levels.tolist(), strict=True):
            now = int(table.base[unit])
            back = self.known.get((unit, level, now))
            turned = (0.0, math.inf) if back is None else (-back[0], back[1])
            found.append(self.known.get((unit, now, level), turned))
        pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def remember(self, table: MoveTable, means: Floats, variances: Floats) -> None:
        """Keep what is known of a table's moves.

        Args:
            table: Moves.
            means: Of their effects, shape (moves,).
            variances: Of these means, infinite where nothing is known, shape (moves,).
        """
        for move in np.flatnonzero(np.isfinite(variances)).tolist():
            unit = int(table.units[move])
            key = (unit, int(table.base[unit]), int(table.levels[move]))
            self.known.pop((unit, key[2], key[1]), None)
            self.known[key] = (float(means[move]), float(variances[move]))

    def drift(self) -> None:
        """Make all effects less certain, as around another incumbent."""
        self.known = {key: (mean, variance + DRIFT * mean**2) for key, (mean, variance) in self.known.items()}

    def state(self) -> list[list[float]]:
        """Return all that is known as JSON: [unit, from, to, mean, variance]."""
        return [[*key, *value] for key, value in sorted(self.known.items())]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Continue from what ``state`` returned."""
        self.known = {(int(u), int(a), int(b)): (float(mean), float(variance)) for u, a, b, mean, variance in state}


class MoveSurvey:
    """Measures the moves around a genome: all a little, then those further whose decision is open.

    Args:
        problem: Units, ladders, budget.
        table: Moves.
        before: Means and variances of what is known of them already.
        tokens: Tokens that a move is measured on, on average.
        text: The text that there is.
    """

    def __init__(
        self, problem: Problem, table: MoveTable, before: tuple[Floats, Floats], *, tokens: int, text: Text
    ) -> None:
        self.problem = problem
        self.table = table
        self.before = before
        self.text = text
        self.groups = groups_of(problem, table)
        self.measured = Measured.none(len(table))
        self.total = tokens * len(table)
        self.tokens = tokens
        self.windows = min(text.windows, 1 + (1 + ROUNDS * MOST) * tokens // text.seq_len + ROUNDS)
        self._round = 0
        self._spent = 0
        self._next = 0  # window
        self._asked: Indices = np.zeros(0, dtype=np.int64)

    def ask(self) -> Request | None:
        """Return the base and the moves that should be scored next, and on which tokens; None at the end."""
        if self._round > ROUNDS or self._next >= self.windows or not len(self.table):
            return None
        moves = self._wanted()
        if self._round == 0:
            tokens = self.tokens * FIRST
        else:
            left = self.total - self._spent
            share = left / (ROUNDS + 1 - self._round)
            tokens = min(share / max(len(moves), 1), self.tokens * MOST)
        if not len(moves) or (self._round and tokens < SEGMENT):
            return None
        length = min(max(int(tokens) // SEGMENT, LEAST_SEGMENTS) * SEGMENT, self.text.seq_len)
        count = max(1, int(tokens) // self.text.seq_len)
        windows = slice(self._next, min(self._next + count, self.windows))
        self._asked = moves
        self._next = windows.stop
        self._round += 1
        self._spent += len(moves) * (windows.stop - windows.start) * length
        return Request(np.concatenate([self.table.base[None], self.table.genomes(moves)]), windows, length)

    def _wanted(self) -> Indices:
        """Return the moves that are measured next: first all that nothing is known of, and always the open ones."""
        if self._round == 0:
            return np.flatnonzero(~np.isfinite(self.before[1]) | self._open())
        return np.flatnonzero(self._open())

    def tell(self, losses: npt.NDArray[np.float32]) -> None:
        """Receive the losses of the genomes asked for last, shape (genomes, windows, tokens)."""
        usable = np.isfinite(losses.sum(axis=(1, 2), dtype=np.float64))
        self.measured = self.measured.adding(self._asked[usable[1:]], losses[usable])

    def combined(self) -> tuple[Floats, Floats]:
        """Return mean and variance of every effect, measured now and before."""
        means, variances = self.measured.means(self.groups)
        now = 1 / variances
        then = 1 / self.before[1]
        total = now + then
        known = total > 0
        mean = np.divide(now * means + then * self.before[0], total, out=np.zeros_like(total), where=known)
        return mean, np.divide(1.0, total, out=np.full_like(total, np.inf), where=known)

    def estimates(self) -> Estimates:
        """Return what is believed of every effect."""
        return shrunk(*self.combined(), self.groups, self.table.directions)

    def _open(self) -> npt.NDArray[np.bool_]:
        """Return the moves whose decision is open: what a wrong one costs on average is not small, shape (moves,)."""
        estimates = self.estimates()
        slack = self.problem.budget - self.problem.cost(self.table.base)
        [choice] = best_moves(self.table, estimates.mean[None], slack=slack, changes=[None])
        regret = expected_regret(estimates.mean + choice.price * self.table.costs, estimates.variance)
        return np.asarray(regret > OPEN * regret.max(initial=0.0))


def expected_regret(mean: Floats, variance: Floats) -> Floats:
    """Return what deciding by the sign of a normal mean loses on average against knowing the value.

    It is σ (φ(z) - z Φ(-z)) with z = |mean| / σ, the value of perfect information (Raiffa and Schlaifer).
    """
    deviation = np.sqrt(np.maximum(variance, np.finfo(float).tiny))
    z = np.abs(mean) / deviation
    tail = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in z.tolist()])
    return np.asarray(deviation * (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) - z * tail))


class Surveyor:
    """Surveys the moves around one incumbent after the other, and says what is believed of any genome's moves.

    Args:
        problem: Units, ladders, budget.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.knowledge = Knowledge()
        self.base: Genome | None = None
        self._survey: MoveSurvey | None = None

    def survey(self, base: Genome, *, tokens: int, text: Text) -> MoveSurvey:
        """Return the survey of the moves around a genome; ``estimates`` of that genome includes it.

        Args:
            base: The incumbent, shape (units,).
            tokens: Tokens that a move is measured on, on average.
            text: The text that there is.
        """
        if self.base is not None and (self.base != base).any():
            self.knowledge.drift()
        self.base = base.copy()
        table = MoveTable.around(self.problem, base)
        self._survey = MoveSurvey(self.problem, table, self.knowledge.of(table), tokens=tokens, text=text)
        return self._survey

    def estimates(self, base: Genome) -> tuple[MoveTable, Estimates]:
        """Return the single-unit moves around a genome, with the estimated effect of each on the loss.

        Estimates join all surveys, those around earlier genomes with more variance; uncertain ones are shrunk towards
        the mean of moves of the same kind.

        Args:
            base: Level indices, shape (units,).
        """
        if self._survey is not None:
            self.knowledge.remember(self._survey.table, *self._survey.combined())
            self._survey = None
        table = MoveTable.around(self.problem, base)
        return table, shrunk(*self.knowledge.of(table), groups_of(self.problem, table), table.directions)

    def state(self) -> dict[str, Any]:
        """Return what is known, as JSON."""
        return {"base": None if self.base is None else self.base.tolist(), "effects": self.knowledge.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        base = state["base"]
        self.base = None if base is None else np.array(base, dtype=np.int64)
        self.knowledge.restore(state["effects"])
