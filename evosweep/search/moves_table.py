"""The single moves away from a genome, and the best sets of them within the budget, chosen by estimated effects."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem
from evosweep.search.moves import steps_down, steps_up

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
HALVINGS = 16  # bisections for the price of a bit


@dataclass(frozen=True)
class MoveTable:
    """Every single move of a unit to a level of its next higher, next lower or own cost.

    Attributes:
        base: The genome that the moves start from, shape (units,).
        units: Index of each move's unit, rising, shape (moves,).
        levels: Level that each move goes to, shape (moves,).
        costs: Bits that each move adds, below 0 where it saves some, shape (moves,).
        directions: 1 for a move to a dearer level, -1 to a cheaper one, 0 to one of equal cost, shape (moves,).
    """

    base: Genome
    units: Indices
    levels: Indices
    costs: Indices
    directions: Indices

    def __len__(self) -> int:
        return len(self.units)

    @classmethod
    def around(cls, problem: Problem, base: Genome) -> "MoveTable":
        """Return the moves away from a genome; units that are dropped with their gate have none."""
        own = problem.plateaus[problem.indices, base]
        up = steps_up(problem, base)
        down = steps_down(problem, base)
        distance = problem.plateaus - own[:, None]
        reachable = (
            ((distance == 1) & (up >= 0)[:, None])
            | ((distance == -1) & (down >= 0)[:, None] & (problem.plateaus >= 0))
            | ((distance == 0) & problem.alive(base)[:, None])
        )
        reachable[problem.indices, base] = False
        units, levels = reachable.nonzero()
        directions = distance[units, levels]
        costs = np.select([directions > 0, directions < 0], [up[units], -down[units]], default=0)
        return cls(base.copy(), units, levels, costs, directions)

    @cached_property
    def options(self) -> Indices:
        """Indices of the moves of every unit that has some, shape (those units, most moves of one); -1 past the end."""
        _, first, counts = np.unique(self.units, return_index=True, return_counts=True)
        offsets = np.arange(counts.max(initial=0))
        return np.where(offsets < counts[:, None], first[:, None] + offsets, -1)

    def genomes(self, moves: Indices) -> npt.NDArray[np.int64]:
        """Return the base after each of some moves alone, shape (moves, units); it may be above the budget."""
        genomes = np.repeat(self.base[None], len(moves), axis=0)
        genomes[np.arange(len(moves)), self.units[moves]] = self.levels[moves]
        return genomes

    def after(self, moves: Indices) -> Genome:
        """Return the base after all of some moves, at most one a unit."""
        genome = self.base.copy()
        genome[self.units[moves]] = self.levels[moves]
        return genome


@dataclass(frozen=True)
class Choice:
    """A set of moves.

    Attributes:
        moves: Their indices, at most one a unit, rising.
        price: What a bit of the budget is worth where it was chosen, in loss.
    """

    moves: Indices
    price: float


def best_moves(table: MoveTable, effects: Floats, *, slack: int, changes: Sequence[int | None]) -> list[Choice]:
    """Return, for each row of effects, moves with about the least sum of effects within budget and number of changes.

    Solved by Lagrangian relaxation (Everett, 1963): at a price a bit, every unit takes its best move and the best
    ``changes`` of these are kept; the price is bisected, and what is left of the budget goes to the best single moves
    that fit. The gap to the optimum is at most about the gain of one move. All rows are solved together.

    Args:
        table: Moves.
        effects: Estimated change of the loss for each move, shape (rows, moves).
        slack: Bits that may be added.
        changes: Most moves of each row; None: any number.
    """
    rows = len(effects)
    units = len(table.options)
    if not units:
        return [Choice(np.zeros(0, dtype=np.int64), 0.0)] * rows
    there = table.options >= 0
    costs = np.where(there, table.costs[table.options], 0)
    padded = np.where(there, effects[:, table.options], np.inf)
    most = np.array([units if limit is None else min(limit, units) for limit in changes])
    moving = table.costs != 0
    density = np.abs(effects[:, moving] / table.costs[moving])
    low = np.zeros(rows)
    high = density.max(axis=1, initial=0.0) * 2 + np.finfo(float).tiny  # no bit is worth that
    best = np.full((rows, units), -1)
    for halving in range(HALVINGS):
        price = low if halving == 0 else (low + high) / 2
        chosen = _cheapest(padded + price[:, None, None] * costs, most)
        bits = np.where(chosen >= 0, costs[np.arange(units), chosen], 0).sum(axis=1)
        fits = bits <= slack
        best = np.where(fits[:, None], chosen, best)
        high = np.where(fits, price, high)
        low = np.where(fits, low, price)
        if (fits & (price == 0)).all():
            break
    found = []
    for row in range(rows):
        taken = best[row] >= 0
        moves = table.options[np.flatnonzero(taken), best[row][taken]]
        moves = _extended(table, effects[row], moves, slack=slack, most=int(most[row]))
        found.append(Choice(moves, float(high[row])))
    return found


def _cheapest(priced: Floats, most: Indices) -> Indices:
    """Return the option that each unit takes, -1 for none: the cheapest, of the ``most`` best units, if below 0.

    Args:
        priced: Effects with the price of their bits, shape (rows, units, options).
        most: Units that may move in each row, shape (rows,).
    """
    options = priced.argmin(axis=2)
    values = np.take_along_axis(priced, options[:, :, None], axis=2)[:, :, 0]
    taken = values < 0
    limited = np.flatnonzero(taken.sum(axis=1) > most)
    if len(limited):
        numbers = most[limited]
        best = np.partition(values[limited], numbers.max() - 1, axis=1)[:, : numbers.max()]
        best.sort(axis=1)
        taken[limited] &= values[limited] <= best[np.arange(len(limited)), numbers - 1][:, None]
        for row in limited[taken[limited].sum(axis=1) > numbers]:  # equal values, where only some are wanted
            taken[row, np.flatnonzero(taken[row])[most[row] :]] = False
    return np.where(taken, options, -1)


def _extended(table: MoveTable, effects: Floats, moves: Indices, *, slack: int, most: int) -> Indices:
    """Return moves with further ones of other units, best first, while budget and number allow it.

    Args:
        table: Moves.
        effects: Of the moves, shape (moves,).
        moves: Indices of those chosen so far.
        slack: Bits that may be added in all.
        most: Most moves in all.
    """
    left = slack - int(table.costs[moves].sum())
    if len(moves) == most:
        return np.sort(moves)
    free = np.ones(len(table.base), dtype=bool)
    free[table.units[moves]] = False
    added = moves.tolist()
    candidates = np.flatnonzero((effects < 0) & free[table.units] & (table.costs <= left))
    for move in candidates[np.argsort(effects[candidates], kind="stable")]:
        if len(added) >= most:
            break
        if free[table.units[move]] and table.costs[move] <= left:
            added.append(int(move))
            free[table.units[move]] = False
            left -= int(table.costs[move])
    return np.sort(np.array(added, dtype=np.int64))
