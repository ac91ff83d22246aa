"""The interface of allocators: they read the columns of a problem's units and return one genome."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from evosweep.core.errors import SettingError, StoreError
from evosweep.core.problem import Genome, Problem


class Allocator(Protocol):
    """Chooses the levels of all units at once, from the problem alone."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the units that it reads; those that need the model are measured first."""

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if this allocator cannot be used for such a problem; called before measuring."""

    def allocate(self, problem: Problem) -> Genome:
        """Return a genome within the budget."""


def is_allocator(value: object) -> TypeGuard[Allocator]:
    """Return whether an object has the attributes and methods of an allocator."""
    return all(hasattr(value, name) for name in ("columns", "check", "allocate"))


def allocator_name(allocator: Allocator) -> str:
    """Return the name by which results show an allocator."""
    return str(getattr(allocator, "name", type(allocator).__name__.lower()))


def check_has_layers(problem: Problem, allocator: Allocator) -> None:
    """Raise a SettingError if all units can only be kept or dropped: they have no columns about a layer's weights."""
    if all(unit.only_drops for unit in problem.units):
        raise SettingError(
            "",
            owner=allocator,
            allowed="one that chooses what to drop (block_influence, leave_one_out, random, evopress)",
            got=allocator_name(allocator),
            hint=f"{allocator_name(allocator)} needs layers with several levels (not compressor=none)",
        )


def check_limits(problem: Problem, allocator: Allocator) -> None:
    """Raise a SettingError if a problem has limits beside its size, and an allocator knows of none."""
    if problem.limits and not getattr(allocator, "holds_limits", False):
        names = " and ".join(f"budget.{limit.name}" for limit in problem.limits)
        raise SettingError(
            "",
            owner=allocator,
            allowed=f"one that holds {names}: ilp, uniform, or a search as evopress or nsga2_evopress",
            got=allocator_name(allocator),
        )


def allocate(allocator: Allocator, problem: Problem) -> Genome:
    """Return the genome that an allocator chooses; where units gate others, without dropping any of these.

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
    """Return a column of the units, or of those with the indices ``only``, shape (units,).

    Args:
        problem: Units.
        name: Of the column.
        only: Indices of units; None: all.

    Raises:
        StoreError: Some unit lacks it.
    """
    units = problem.units if only is None else [problem.units[index] for index in only]
    lacking = [unit.name for unit in units if name not in unit.columns]
    if lacking:
        raise StoreError(f"column {name!r} is missing for {len(lacking)} units ({lacking[0]} ...)")
    return np.array([unit.columns[name] for unit in units])
