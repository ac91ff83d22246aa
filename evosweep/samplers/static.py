"""Allocators as Optuna samplers: one proposal, then nothing more to say."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evosweep.allocators.base import Allocator, allocate
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import PopulationSampler


class AllocatorSampler(PopulationSampler):
    """Proposes what an allocator chooses; every further trial of a ``study.optimize`` repeats it.

    Args:
        problem: Units, ladders, budget.
        allocator: Chooses the allocation.
        seed: Not used by allocators; kept so that all samplers are built alike.
    """

    limit = 1

    def __init__(self, problem: Problem, *, allocator: Allocator, seed: int = 0) -> None:
        super().__init__(problem, seed=seed)
        allocator.check(problem)
        self.allocator = allocator
        self.name = _name(allocator)
        self.columns = tuple(allocator.columns)

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the one genome in generation 0, nothing later."""
        del parents
        return [allocate(self.allocator, self.problem)] if generation == 0 else []

    def size(self, generation: int) -> int:
        """Return 1."""
        del generation
        return 1


class SweptAllocatorSampler(PopulationSampler):
    """Proposes what an allocator chooses at every combination of its own settings; the best of them is the winner.

    Args:
        problem: Units, ladders, budget.
        allocator: Makes the allocator; takes the swept settings.
        sweep: Values of each setting.
        seed: Of nothing here; the tokens that decide are the run's.

    Raises:
        SettingError: Nothing is swept.
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
        if not sweep or not all(sweep.values()):
            raise SettingError("sweep", allowed="a list of values for each setting of the allocator", got=sweep)
        self.allocators = [
            allocator(**dict(zip(sweep, values, strict=True))) for values in itertools.product(*sweep.values())
        ]
        for each in self.allocators:
            each.check(problem)
        self.name = f"{_name(self.allocators[0])}_sweep"
        self.columns = tuple(dict.fromkeys(column for each in self.allocators for column in each.columns))

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return all of them in generation 0, nothing later."""
        del parents
        return [] if generation else [allocate(each, self.problem) for each in self.allocators]

    def size(self, generation: int) -> int:
        """Return how many there are; in ``study.optimize`` they repeat."""
        del generation
        return len(self.allocators)


def _name(allocator: Allocator) -> str:
    return str(getattr(allocator, "name", type(allocator).__name__.lower()))
