"""Solves another budget from what a run left: its measurements and its winners. Nothing is scored.

The additive model of harm that the run measured is minimized by integer programming at the new size. What a search
changed against that model's own choice at a size near it is kept, and only the rest is solved: the search has scored
these changes, the model has not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.allocators.harm import COLUMNS, DEFAULT, Harm
from evosweep.allocators.ilp import least_harm
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Genome, Problem

Floats = npt.NDArray[np.float64]
NEAR = 0.15  # of a winner's bits: further away, what its search changed is not kept
BARE = "bare"  # layer errors alone, the last resort
NODES = 100_000  # of branch and bound


@dataclass(frozen=True)
class Winner:
    """What a search found at a size.

    Attributes:
        name: Of the run, or of the point of its front.
        genome: Shape (units,).
        kl: Measured on validation.
        searched: Whether it comes of a search, not of an allocator alone.
    """

    name: str
    genome: Genome
    kl: float
    searched: bool


@dataclass(frozen=True)
class Resolved:
    """What is predicted to be best at a budget.

    Attributes:
        genome: Shape (units,).
        kl: Predicted, from the nearest winner's; None where the run has none.
        made_of: In words, what it was made of.
    """

    genome: Genome
    kl: float | None
    made_of: str


def harm_of(problem: Problem, sampler: Mapping[str, Any]) -> Harm:
    """Return the model of harm to solve by: the one that a run's sampler names, if measured, else one that is.

    Args:
        problem: Units with the columns that were measured.
        sampler: Its section of the settings.

    Raises:
        EvosweepError: Nothing was measured that a budget could be solved by.
    """
    named = [kind for kind in _harms(sampler) if kind in COLUMNS]
    for kind in dict.fromkeys([*named, DEFAULT, *(kind for kind in COLUMNS if kind != BARE), BARE]):
        try:
            harm = Harm(kind)
            harm.check(problem)
            harm.table(problem)
        except EvosweepError:
            continue
        return harm
    raise EvosweepError(
        "the run measured nothing that another budget could be solved by: no sensitivities of units, and its levels "
        "have no layer errors; run it with sampler=ilp or sampler=evopress_ilp"
    )


def _harms(section: Any) -> list[str]:
    """Return the values of all keys ``harm`` in a section, at any depth."""
    if not isinstance(section, Mapping):
        return []
    own = [str(value) for key, value in section.items() if key == "harm"]
    return own + [text for value in section.values() for text in _harms(value)]


def resolve(problem: Problem, harm: Harm, winners: Sequence[Winner]) -> Resolved:
    """Return the allocation that is predicted to be best within a problem's budget.

    Args:
        problem: Units with what was measured of them, under the new budget.
        harm: Model to solve by.
        winners: What was found at other sizes.
    """
    table = harm.table(problem)
    solved = least_harm(problem, table, node_limit=NODES)
    name = f"ilp by {harm.kind}"
    if not winners:
        return Resolved(solved, None, name)
    nearest = min(winners, key=lambda winner: abs(problem.cost(winner.genome) - problem.budget))
    size = problem.cost(nearest.genome)
    genome = solved
    if nearest.searched and abs(size - problem.budget) <= NEAR * size:
        before = least_harm(problem.within(size), table, node_limit=NODES)
        changes = nearest.genome - before
        kept = _with_changes(problem, table, solved, changes)
        if kept is not None and changes.any():
            genome = kept
            name += f" with {int((changes != 0).sum())} changes of {nearest.name}"
    known = _total(table, nearest.genome)
    predicted = nearest.kl * _total(table, genome) / known if known > 0 else None
    return Resolved(genome, predicted, name)


def _with_changes(problem: Problem, table: Floats, solved: Genome, changes: Genome) -> Genome | None:
    """Return the least harm with the changed units at their changed levels; None where that fits no budget.

    Args:
        problem: Units, ladders, budget.
        table: Harm of every level, shape (units, longest ladder).
        solved: What is best without changes.
        changes: Steps of every unit, shape (units,).
    """
    changed = np.flatnonzero(changes)
    fixed = np.clip(solved + changes, 0, problem.sizes - 1)
    cheapest = np.where(changes != 0, fixed, 0)
    if problem.cost(cheapest) > problem.budget:
        return None
    rows = table.copy()
    rows[changed] = np.inf
    rows[changed, fixed[changed]] = table[changed, fixed[changed]]
    try:
        found = least_harm(problem, rows, node_limit=NODES)
    except EvosweepError:
        return None
    kept = (found[changed] == fixed[changed]).all()
    return found if kept and problem.feasible(found) else None


def _total(table: Floats, genome: Genome) -> float:
    return float(table[np.arange(len(genome)), genome].sum())
