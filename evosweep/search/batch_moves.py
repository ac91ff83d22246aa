"""Moves on many genomes at once, each within a budget of its own; see ``moves`` for the same on one genome.

A step goes to the next level that costs more or less, and lands on one of the levels of that cost by lot. Units are
drawn by rejection: a few at random, the first legal one is taken; only where none is, all are looked at. So a step of
a whole generation is a handful of array operations.
"""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Problem

Genomes = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
DRAWS = 8  # units drawn for a row before all are looked at
EARLIER = np.tri(DRAWS, k=-1, dtype=bool)  # of two draws, whether the second came before the first
PASSES = 3  # coarse passes in which a row takes many steps at once
SHARE = 0.8  # of the way that a coarse pass goes on average


class BatchMoves:
    """Steps, swaps and exchanges of the rows of a matrix of genomes.

    Args:
        problem: Units and ladders, none of which gates another.
    """

    def __init__(self, problem: Problem) -> None:
        self.units = len(problem.units)
        self.width = problem.costs.shape[1]
        self.total_levels = problem.total_levels
        self.has_equal_costs = problem.has_equal_costs
        self._offsets = np.arange(self.units) * self.width
        self._costs = problem.costs.ravel()
        self._rises = problem.rises.ravel()
        self._falls = problem.falls.ravel()
        self._up = problem.next_up.ravel()
        self._down = problem.next_down.ravel()
        same = problem.plateaus[:, :, None] == problem.plateaus[:, None, :]
        self._equal = same.sum(axis=2).ravel()  # levels of that cost, for every (unit, level)
        self._first = same.argmax(axis=2).ravel()

    def costs(self, genomes: Genomes) -> npt.NDArray[np.int64]:
        """Return the bits of every row, shape (rows,)."""
        return np.asarray(self._costs.take(genomes + self._offsets).sum(axis=1))

    def fit(self, genomes: Genomes, budgets: npt.NDArray[np.int64], rng: np.random.Generator) -> None:
        """Lower or raise random units of every row until it spends its budget, in place.

        Args:
            genomes: Shape (rows, units); changed in place.
            budgets: Bits of every row, at least those of the cheapest genome, shape (rows,).
            rng: Chooses the units.
        """
        for _ in range(PASSES):
            slack = budgets - self.costs(genomes)
            for sign, table, moves in ((-1, self._falls, self._down), (1, self._rises, self._up)):
                rows = np.flatnonzero(slack < 0 if sign < 0 else slack > 0)
                self._coarse(genomes, rows, np.abs(slack[rows]), table, moves, rng)
        slack = budgets - self.costs(genomes)
        self._balance(genomes, slack, rng, up=False)
        self._balance(genomes, slack, rng, up=True)

    def _coarse(
        self,
        genomes: Genomes,
        rows: Rows,
        distance: npt.NDArray[np.int64],
        table: npt.NDArray[np.int64],
        moves: npt.NDArray[np.int64],
        rng: np.random.Generator,
    ) -> None:
        """Move every unit of some rows by one step, each with a probability that covers most of the distance.

        Args:
            genomes: Shape (rows, units); changed in place.
            rows: Which rows.
            distance: Bits between each of them and its budget.
            table: Bits of a step.
            moves: Level after a step.
            rng: Chooses the units.
        """
        index = genomes[rows] + self._offsets
        steps = np.maximum(table.take(index), 0)
        total = np.maximum(steps.sum(axis=1), 1)
        far = distance > 2 * steps.max(axis=1, initial=0)
        chance = np.where(far, np.minimum(SHARE * distance / total, 1.0), 0.0)
        moved = (rng.random(steps.shape, dtype=np.float32) < chance[:, None]) & (steps > 0)
        genomes[rows] = np.where(moved, moves.take(index), genomes[rows])

    def flip(self, genomes: Genomes, counts: npt.NDArray[np.int64], *, cross: float, rng: np.random.Generator) -> None:
        """Change every row by some flips that keep its cost or lower it a little, in place: swaps, and exchanges.

        Args:
            genomes: Shape (rows, units); changed in place. Rows without a legal move stay as they are.
            counts: Flips of every row, shape (rows,).
            cross: Probability of an exchange instead of a swap.
            rng: Chooses the units.
        """
        swaps = rng.binomial(counts, 1 - cross)
        done = np.zeros(len(genomes), dtype=np.int64)
        for swap in range(int(swaps.max(initial=0))):
            done[self._swap(genomes, np.flatnonzero(swaps > swap), rng)] += 1
        self._exchange(genomes, counts - done, rng)

    def sidestep(self, genomes: Genomes, rows: Rows, rng: np.random.Generator) -> None:
        """Move one unit of each of some rows to another of its levels of equal cost, in place.

        Args:
            genomes: Shape (rows, units); changed in place.
            rows: Which rows.
            rng: Chooses the units and levels.
        """
        units = self._pick(genomes, rows, self._equal - 1, rng)
        index = units * self.width + genomes[rows, units]
        count = self._equal[index]
        first = self._first[index]
        other = first + (genomes[rows, units] - first + 1 + rng.integers(np.maximum(count - 1, 1))) % count
        genomes[rows, units] = np.where(units >= 0, other, genomes[rows, units])

    def _swap(self, genomes: Genomes, rows: Rows, rng: np.random.Generator) -> Rows:
        """Raise a unit and lower another by as many bits in some rows; return the rows in which that was possible."""
        raised = self._pick(genomes, rows, self._rises, rng)
        rows = rows[raised >= 0]
        raised = raised[raised >= 0]
        before = genomes[rows].copy()
        bits = self._step(genomes, rows, raised, rng, up=True)
        lowered = self._pick(genomes, rows, self._falls, rng, least=bits, most=bits, before=before)
        fails = lowered < 0
        genomes[rows[fails]] = before[fails]
        self._step(genomes, rows[~fails], lowered[~fails], rng, up=False)
        return rows[~fails]

    def _exchange(self, genomes: Genomes, counts: npt.NDArray[np.int64], rng: np.random.Generator) -> None:
        """Raise some units of every row, lower others until it costs no more than before, spend what is left over.

        Args:
            genomes: Shape (rows, units); changed in place. Rows in which that is impossible stay as they are.
            counts: Units to raise in every row, shape (rows,).
            rng: Chooses the units.
        """
        rows = np.flatnonzero(counts > 0)
        mine = genomes[rows]
        before = mine.copy()
        slack = np.zeros(len(rows), dtype=np.int64)
        for count in range(int(counts.max(initial=0))):
            some = np.flatnonzero(counts[rows] > count)
            raised = self._pick(mine, some, self._rises, rng)
            some = some[raised >= 0]
            slack[some] -= self._step(mine, some, raised[raised >= 0], rng, up=True)
        self._balance(mine, slack, rng, up=False, before=before)
        fails = slack < 0
        mine[fails] = before[fails]
        slack[fails] = 0
        self._balance(mine, slack, rng, up=True, before=before)
        genomes[rows] = mine

    def _balance(
        self,
        genomes: Genomes,
        slack: npt.NDArray[np.int64],
        rng: np.random.Generator,
        *,
        up: bool,
        before: Genomes | None = None,
    ) -> None:
        """Lower random units until no row's slack is below 0, or raise them while it allows that; in place, slack too.

        Args:
            genomes: Shape (rows, units).
            slack: Bits that every row leaves of its budget.
            rng: Chooses the units.
            up: Raise units of rows whose slack is above 0, or lower those of rows whose slack is below 0.
            before: Units that were raised above this (``up``: lowered below it) stay as they are, shape (rows, units).
        """
        sign = 1 if up else -1
        rows = np.flatnonzero(sign * slack > 0)
        for _ in range(self.total_levels):
            if not len(rows):
                return
            old = None if before is None else before[rows]
            moved = self._several(genomes, rows, slack, rng, before=old, up=up)
            stuck = rows[~moved]
            most = slack[stuck] if up else None
            mine = None if old is None else old[~moved]
            steps = self._rises if up else self._falls
            units = self._pick(genomes, stuck, steps, rng, most=most, before=mine, up=up)
            stuck = stuck[units >= 0]
            slack[stuck] -= sign * self._step(genomes, stuck, units[units >= 0], rng, up=up)
            rows = np.concatenate([rows[moved], stuck])
            rows = rows[sign * slack[rows] > 0]

    def _several(
        self,
        genomes: Genomes,
        rows: Rows,
        slack: npt.NDArray[np.int64],
        rng: np.random.Generator,
        *,
        before: Genomes | None,
        up: bool,
    ) -> npt.NDArray[np.bool_]:
        """Draw a few units for every row and move each that its slack calls for, in place; return which rows changed.

        Args:
            genomes: Shape (rows, units).
            rows: Which rows.
            slack: Bits that every row leaves of its budget; in place, too.
            rng: Chooses the units.
            before: Units that were raised above this (``up``: lowered below it) are left out, shape (rows, units).
            up: Raise units while the slack allows it, or lower them while it is below 0.
        """
        drawn = rng.integers(self.units, size=(len(rows), DRAWS))
        levels = genomes[rows[:, None], drawn]
        steps = (self._rises if up else self._falls).take(drawn * self.width + levels)
        twice = ((drawn[:, :, None] == drawn[:, None, :]) & EARLIER).any(axis=2)
        legal = (steps > 0) & ~twice
        if before is not None:
            old = before[np.arange(len(rows))[:, None], drawn]
            legal &= (levels >= old) if up else (levels <= old)
        left = slack[rows]
        taken = np.zeros_like(legal)
        for column in range(DRAWS):
            bits = steps[:, column]
            moves = legal[:, column] & ((bits <= left) if up else (left < 0))
            taken[:, column] = moves
            left += np.where(moves, -bits if up else bits, 0)
        slack[rows] = left
        row, column = taken.nonzero()
        self._step(genomes, rows[row], drawn[row, column], rng, up=up)
        return np.asarray(taken.any(axis=1))

    def _step(self, genomes: Genomes, rows: Rows, units: Rows, rng: np.random.Generator, *, up: bool) -> Rows:
        """Move one unit of each of some rows by a step, in place; return the bits of the steps.

        Args:
            genomes: Shape (rows, units).
            rows: Which rows.
            units: Which unit of each, shape as ``rows``.
            rng: Chooses among levels of equal cost.
            up: Whether to the next level that costs more, or to the next that costs less.
        """
        index = units * self.width + genomes[rows, units]
        landed = (self._up if up else self._down)[index]
        if self.has_equal_costs:
            landed = units * self.width + landed
            landed = self._first[landed] + rng.integers(self._equal[landed])
        genomes[rows, units] = landed
        return np.asarray((self._rises if up else self._falls)[index])

    def _pick(
        self,
        genomes: Genomes,
        rows: Rows,
        table: npt.NDArray[np.int64],
        rng: np.random.Generator,
        *,
        least: Rows | None = None,
        most: Rows | None = None,
        before: Genomes | None = None,
        up: bool = False,
    ) -> Rows:
        """Return for each of some rows a unit, by lot among those whose step is between two bounds; -1: there is none.

        Args:
            genomes: Shape (rows, units).
            rows: Which rows.
            table: Bits of a step, of every (unit, level).
            rng: Chooses the units.
            least: Fewest bits; None: 1.
            most: Most bits; None: any number.
            before: Units that were raised above this (``up``: lowered below it) are left out, shape (rows, units).
            up: Whether the step goes up.
        """
        drawn = rng.integers(self.units, size=(len(rows), DRAWS))
        levels = genomes[rows[:, None], drawn]
        steps = table.take(drawn * self.width + levels)
        legal = _between(steps, least, most)
        local = np.arange(len(rows))
        if before is not None:
            old = before[local[:, None], drawn]
            legal &= (levels >= old) if up else (levels <= old)
        units = drawn[local, legal.argmax(axis=1)]
        missing = np.flatnonzero(~legal.any(axis=1))
        if len(missing):
            mine = genomes[rows[missing]]
            steps = table.take(mine + self._offsets)
            low = None if least is None else least[missing]
            legal = _between(steps, low, None if most is None else most[missing])
            if before is not None:
                legal &= (mine >= before[missing]) if up else (mine <= before[missing])
            units[missing] = _one_of(legal, rng)
        return np.asarray(units)


def _between(steps: npt.NDArray[np.int64], least: Rows | None, most: Rows | None) -> npt.NDArray[np.bool_]:
    """Return which steps of every row are within its bounds, shape as ``steps``."""
    legal = steps > 0 if least is None else steps >= least[:, None]
    return legal if most is None else legal & (steps <= most[:, None])


def _one_of(legal: npt.NDArray[np.bool_], rng: np.random.Generator) -> Rows:
    """Return the index of a true entry of every row, by lot; -1 where there is none."""
    counts = legal.sum(axis=1)
    units = np.full(len(legal), -1)
    some = np.flatnonzero(counts)
    wanted = rng.integers(counts[some])
    units[some] = (legal[some].cumsum(axis=1, dtype=np.int32) > wanted[:, None]).argmax(axis=1)
    return units
