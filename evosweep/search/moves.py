"""Moves on genomes that keep within the budget: swap, exchange, sidestep, repair, fill.

Levels of one unit may cost the same, and steps may be unequal. Every step up or down therefore goes to the next level
that costs more or less, and lands on one of the levels of that cost by lot; ``sidestep`` walks among equal costs.
Where all costs differ, no lot is drawn, and a step is one level.
"""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem
from evosweep.search.mending import affordable_steps, mend

Steps = npt.NDArray[np.int64]
LIGHT_TRIES = 4


def steps_up(problem: Problem, genome: Genome) -> Steps:
    """Return the bits that raising each unit to its next dearer level adds, shape (units,).

    -1 for a unit at its highest cost or dropped with its gate. A dropped gate brings back the units that it gates.
    """
    steps = problem.rises[problem.indices, genome]
    return _with_gated_units(problem, genome, steps, opening=True) if problem.gated else steps


def steps_down(problem: Problem, genome: Genome) -> Steps:
    """Return the bits that lowering each unit to its next cheaper level saves, shape (units,).

    -1 for a unit at its lowest cost or dropped with its gate. A gate that is dropped saves the units that it gates.
    """
    steps = problem.falls[problem.indices, genome]
    return _with_gated_units(problem, genome, steps, opening=False) if problem.gated else steps


def _with_gated_units(problem: Problem, genome: Genome, steps: Steps, *, opening: bool) -> Steps:
    """Return steps of units and gates, with the cost of the units that a gate brings back or drops.

    Args:
        problem: Units, some of which gate others.
        genome: Shape (units,).
        steps: Bits of each unit's own step, shape (units,).
        opening: Whether the steps go up (from level 0, a gate brings its units back) or down (to level 0).
    """
    gated = problem.gate != problem.indices
    costs = problem.costs[problem.indices, genome]
    behind = np.bincount(problem.gate[gated], weights=costs[gated], minlength=len(genome)).astype(np.int64)
    toggles = genome == 0 if opening else problem.next_down[problem.indices, genome] == 0
    movable = (steps >= 0) & problem.alive(genome)
    return np.where(movable, steps + np.where(toggles, behind, 0), -1)


def swap(problem: Problem, genome: Genome, rng: np.random.Generator, *, among: Steps | None = None) -> bool:
    """Raise one unit and lower another by the same number of bits, in place.

    Args:
        problem: Units, ladders, budget.
        genome: Shape (units,); changed in place.
        rng: Chooses the units.
        among: Label of every unit, shape (units,): both must have the same (as ``problem.kinds``, the name inside their
            blocks); None: any two.

    Returns:
        False, with the genome unchanged, if no two units allow a swap.
    """
    up = steps_up(problem, genome)
    down = steps_down(problem, genome)
    for raised in rng.permutation(_indices(up >= 0)):
        matches = down == up[raised]
        partners = _indices(matches if among is None else matches & (among == among[raised]))
        partners = partners[partners != raised]
        if len(partners):
            _raise(problem, genome, int(raised), rng)
            _lower(problem, genome, _choose(partners, rng), rng)
            return True
    return False


def exchange(problem: Problem, genome: Genome, rng: np.random.Generator, *, light: bool = False) -> bool:
    """Raise one unit, lower others until the budget holds again, spend what is left over; in place.

    Args:
        problem: Units, ladders, budget.
        genome: Shape (units,); changed in place.
        rng: Chooses the units.
        light: Leave out at once what would cost more than all others together can save, and give up after a few: where
            hardly anything can be lowered, trying it all out takes long. It draws other random numbers.

    Returns:
        False, with the genome unchanged, if no unit can be raised that way.
    """
    before = genome.copy()
    up = steps_up(problem, genome)
    slack = problem.budget - problem.cost(genome)
    raisable = up >= 0
    if light:
        raisable &= up <= slack + problem.cost(genome) - problem.least
    for raised in rng.permutation(_indices(raisable))[: LIGHT_TRIES if light else None]:
        _raise(problem, genome, int(raised), rng)
        left = _repair(problem, genome, rng, slack=slack - int(up[raised]), keep=(int(raised),))
        if left >= 0:
            _fill(problem, genome, rng, slack=left, free=genome >= before)
            return True
        genome[:] = before
    return False


def sidestep(problem: Problem, genome: Genome, rng: np.random.Generator) -> bool:
    """Move one unit to another of its levels that costs the same, in place.

    Args:
        problem: Units, ladders, budget.
        genome: Shape (units,); changed in place.
        rng: Chooses the units and its level.

    Returns:
        False, with the genome unchanged, if no unit has such a level.
    """
    own = problem.plateaus[problem.indices, genome]
    equal = (problem.plateaus == own[:, None]) & problem.alive(genome)[:, None]
    equal[problem.indices, genome] = False
    movable = _indices(equal.any(axis=1))
    if not len(movable):
        return False
    moved = _choose(movable, rng)
    genome[moved] = _choose(_indices(equal[moved]), rng)
    return True


def repair(problem: Problem, genome: Genome, rng: np.random.Generator, *, keep: tuple[int, ...] = ()) -> bool:
    """Lower random units step by step until the budget holds, in place.

    Args:
        problem: Units, ladders, budget.
        genome: Shape (units,); changed in place.
        rng: Chooses the units.
        keep: Indices of units that stay as they are.

    Returns:
        Whether the budget and all limits hold. Without ``keep`` and limits they always do.
    """
    fits = _repair(problem, genome, rng, slack=problem.budget - problem.cost(genome), keep=keep) >= 0
    return mend(problem, genome, rng, free=_all_but(keep, len(genome))) if problem.limits else fits


def _repair(problem: Problem, genome: Genome, rng: np.random.Generator, *, slack: int, keep: tuple[int, ...]) -> int:
    """Repair a genome that leaves ``slack`` bits of the budget; return the slack afterwards, below 0 on failure."""
    free = _all_but(keep, len(genome))
    for _ in range(problem.total_levels):
        if slack >= 0:
            break
        down = steps_down(problem, genome)
        lowerable = _indices((down > 0) & free)
        if not len(lowerable):
            break
        lowered = _choose(lowerable, rng)
        _lower(problem, genome, lowered, rng)
        slack += int(down[lowered])
    return slack


def fill(problem: Problem, genome: Genome, rng: np.random.Generator, *, keep: tuple[int, ...] = ()) -> None:
    """Raise random units step by step while the rest of the budget allows it, in place.

    Args:
        problem: Units, ladders, budget.
        genome: A feasible genome, shape (units,); changed in place.
        rng: Chooses the units.
        keep: Indices of units that stay as they are.
    """
    _fill(problem, genome, rng, slack=problem.budget - problem.cost(genome), free=_all_but(keep, len(genome)))


def _fill(
    problem: Problem, genome: Genome, rng: np.random.Generator, *, slack: int, free: npt.NDArray[np.bool_]
) -> None:
    for _ in range(problem.total_levels):
        up = steps_up(problem, genome)
        possible = (up >= 0) & (up <= slack) & free
        affordable = _indices(possible & affordable_steps(problem, genome) if problem.limits else possible)
        if not len(affordable):
            return
        raised = _choose(affordable, rng)
        _raise(problem, genome, raised, rng)
        slack -= int(up[raised])


def _raise(problem: Problem, genome: Genome, unit: int, rng: np.random.Generator) -> None:
    """Set a unit to a level of its next higher cost, in place."""
    if problem.limits:  # what the limits allow was worked out for this level of its cost
        genome[unit] = problem.next_up[unit, genome[unit]]
    elif problem.has_equal_costs:
        genome[unit] = _one_of_its_cost(problem, unit, int(problem.next_up[unit, genome[unit]]), rng)
    else:
        genome[unit] += 1


def _lower(problem: Problem, genome: Genome, unit: int, rng: np.random.Generator) -> None:
    """Set a unit to a level of its next lower cost, in place."""
    if problem.has_equal_costs:
        genome[unit] = _one_of_its_cost(problem, unit, int(problem.next_down[unit, genome[unit]]), rng)
    else:
        genome[unit] -= 1


def _one_of_its_cost(problem: Problem, unit: int, level: int, rng: np.random.Generator) -> int:
    """Return a level of a unit that costs the same as ``level``, by lot."""
    return _choose(_indices(problem.plateaus[unit] == problem.plateaus[unit, level]), rng)


def _all_but(keep: tuple[int, ...], units: int) -> npt.NDArray[np.bool_]:
    free = np.ones(units, dtype=bool)
    free[list(keep)] = False
    return free


def _indices(mask: npt.NDArray[np.bool_]) -> Steps:
    return mask.nonzero()[0]  # numpy.flatnonzero without its overhead: this is the innermost loop


def _choose(options: Steps, rng: np.random.Generator) -> int:
    return int(options[rng.integers(len(options))])  # as rng.choice, which takes three times as long


def random_feasible(problem: Problem, rng: np.random.Generator) -> Genome:
    """Return a random genome within the budget that leaves no room to raise any unit."""
    genome = rng.integers(0, problem.sizes)
    if not repair(problem, genome, rng):
        genome = problem.uniform()
    fill(problem, genome, rng)
    return genome
