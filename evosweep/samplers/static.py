"""Allocators as Optuna samplers: they propose one generation, and the search ends."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evosweep.allocators.base import Allocator, allocate, allocator_name, check_limits, is_allocator
from evosweep.core.errors import SettingError, did_you_mean
from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import PopulationSampler


class AllocatorSampler(PopulationSampler):
    """Proposes the allocation that an allocator chooses; every further trial of a ``study.optimize`` repeats it.

    Args:
        problem: Units, ladders, budget.
        allocator: Chooses the allocation.
        seed: Not used by allocators; kept so that all samplers are built alike.
    """

    limit = 1
    holds_limits = True

    def __init__(self, problem: Problem, *, allocator: Allocator, seed: int = 0) -> None:
        super().__init__(problem, seed=seed)
        if not is_allocator(allocator):
            raise SettingError("allocator", allowed="an allocator (a section with _target_)", got=allocator)
        check_limits(problem, allocator)
        allocator.check(problem)
        self.allocator = allocator
        self.name = allocator_name(allocator)
        self.columns = tuple(allocator.columns)

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the one genome in generation 0, nothing later."""
        del parents
        return [allocate(self.allocator, self.problem)] if generation == 0 else []

    def size(self, generation: int) -> int:
        """Return 1."""
        del generation
        return 1

    def facts(self) -> Mapping[str, float]:
        """Return what the allocator reports about its choice, if it does."""
        return dict(getattr(self.allocator, "facts", {}))


class SweptAllocatorSampler(PopulationSampler):
    """Proposes what an allocator chooses at every combination of its own settings; the best of them is the winner.

    Args:
        problem: Units, ladders, budget.
        allocator: Makes the allocator; takes the swept settings.
        sweep: Values of each setting, a list for each.
        seed: Not used; kept so that all samplers are built alike.

    Raises:
        SettingError: Nothing is swept, or the allocator does not take a setting or a value.
    """

    limit = 1

    def __init__(
        self,
        problem: Problem,
        *,
        allocator: Callable[..., Allocator],
        sweep: Mapping[str, Sequence[Any]],
        seed: int = 0,
    ) -> None:
        super().__init__(problem, seed=seed)
        self.allocators = _combinations(allocator, sweep)
        for member in self.allocators:
            member.check(problem)
        self.name = f"{allocator_name(self.allocators[0])}_sweep"
        self.columns = tuple(dict.fromkeys(column for member in self.allocators for column in member.columns))

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the genomes of all combinations in generation 0, nothing later."""
        del parents
        return [] if generation else [allocate(member, self.problem) for member in self.allocators]

    def size(self, generation: int) -> int:
        """Return the number of combinations; in ``study.optimize`` they repeat."""
        del generation
        return len(self.allocators)


def _combinations(allocator: Callable[..., Allocator], sweep: Mapping[str, Sequence[Any]]) -> list[Allocator]:
    """Return an allocator for every combination of settings.

    Raises:
        SettingError: As SweptAllocatorSampler says.
    """
    lists = isinstance(sweep, Mapping) and all(isinstance(values, list | tuple) and values for values in sweep.values())
    if not sweep or not lists:
        raise SettingError("sweep", allowed="a list of values for each setting of the allocator", got=sweep)
    if not callable(allocator):
        raise SettingError("allocator", allowed="an allocator with _partial_: true", got=allocator)
    taken = list(inspect.signature(allocator).parameters)
    for setting in sweep:
        if setting not in taken:
            hint = f"it takes {', '.join(taken)}{did_you_mean(setting, taken)}"
            raise SettingError("sweep", allowed="of settings that the allocator takes", got=setting, hint=hint)
    made = []
    for values in itertools.product(*sweep.values()):
        settings = dict(zip(sweep, values, strict=True))
        try:
            made.append(allocator(**settings))
        except SettingError as error:
            raise SettingError("sweep", allowed=f"values that the allocator takes ({error})", got=settings) from error
    if not is_allocator(made[0]):
        raise SettingError("allocator", allowed="an allocator with _partial_: true", got=allocator)
    return made
