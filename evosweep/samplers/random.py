"""Random feasible allocations as an Optuna sampler."""

from collections.abc import Sequence

from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.search.evolution import RandomSearch


class RandomFeasibleSampler(PopulationSampler):
    """Random allocations that spend the budget: the baseline of every search.

    Args:
        problem: Units, ladders, budget.
        seed: Same seed, same proposals.
        offspring: Proposals a generation.
    """

    holds_limits = True
    name = "random"

    def __init__(self, problem: Problem, *, seed: int = 0, offspring: int = 64) -> None:
        super().__init__(problem, seed=seed)
        self.search = RandomSearch(problem, seed=seed, offspring=offspring)

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return new random genomes."""
        del parents
        return self.search.draw(generation=generation)

    def size(self, generation: int) -> int:
        """Return the number of trials of a generation."""
        del generation
        return self.search.size
