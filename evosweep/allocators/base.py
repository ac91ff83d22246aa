"""What an allocator is: the manifest's columns in, one genome out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.errors import StoreError
from evosweep.core.problem import Genome, Problem


class Allocator(Protocol):
    """Chooses every unit's level at once, from what the problem knows.

    Attributes:
        columns: Columns of the units that it reads; those that need the model are measured first.
    """

    columns: Sequence[str]

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if this allocator has nothing to say about such a problem, before it is measured."""

    def allocate(self, problem: Problem) -> Genome:
        """Return a genome within the budget."""


def allocate(allocator: Allocator, problem: Problem) -> Genome:
    """Return what an allocator chooses; where units gate others, among allocations that drop none of them.

    Raises:
        BudgetError: The budget cannot be met without dropping.
    """
    if not problem.gating.any():
        return allocator.allocate(problem)
    dearest = problem.sizes - 1
    gates = int(problem.costs[np.arange(len(dearest)), dearest][problem.gating].sum())
    units = tuple(unit for unit in problem.units if not unit.gates)
    dearest[~problem.gating] = allocator.allocate(replace(problem, units=units, budget=problem.budget - gates))
    return dearest


def column(problem: Problem, name: str, *, only: Sequence[int] | None = None) -> npt.NDArray[np.float64]:
    """Return a column of the units, or only of those at some places, shape (units,).

    Raises:
        StoreError: Some unit lacks it.
    """
    units = problem.units if only is None else [problem.units[place] for place in only]
    lacking = [unit.name for unit in units if name not in unit.columns]
    if lacking:
        raise StoreError(f"column {name!r} is missing for {len(lacking)} units ({lacking[0]} ...)")
    return np.array([unit.columns[name] for unit in units])
