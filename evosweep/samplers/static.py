"""Allocators as Optuna samplers: one proposal, then nothing more to say."""

from evosweep.allocators.base import Allocator, allocate
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
        self.name = getattr(allocator, "name", type(allocator).__name__.lower())
        self.columns = tuple(allocator.columns)

    def genomes(self, *, generation: int, elite: Genome | None) -> list[Genome]:
        """Return the one genome in generation 0, nothing later."""
        del elite
        return [allocate(self.allocator, self.problem)] if generation == 0 else []

    def size(self, generation: int) -> int:
        """Return 1."""
        del generation
        return 1
