"""Offspring of a front of sizes: a parent's own size kept, another size, or two parents crossed."""

from collections.abc import Callable, Sequence

import numpy as np

from evosweep.core.checks import check_int, check_number
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.moves import fill, repair
from evosweep.search.mutation import Mutation

Base = Callable[[Problem], Genome]
SPAN = 0.1  # how far a parent's size is changed at most, as a share of the range of sizes


class FrontOffspring:
    """Makes the offspring of parents of different sizes, as in a genetic algorithm of two objectives.

    Args:
        problem: Units and ladders; its budget is the largest size.
        seed: Seeds all randomness, together with what it is used for (generation, slot).
        mutation: Changes a genome at its size.
        least: Smallest size in bits.
        resize: Probability that an offspring gets another size than its parent.
        cross: Probability that it takes each unit's level from one of two parents; otherwise it keeps its size.
        base: Returns what an allocator without a search chooses under a budget. Resizing a parent keeps in which units
            it differs from that. None: random units are lowered or raised.
        sizes: Of bases; they are made once for each of so many sizes.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int,
        mutation: Mutation,
        least: int,
        resize: float = 0.4,
        cross: float = 0.2,
        base: Base | None = None,
        sizes: int = 64,
    ) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self.mutation = mutation
        self.least = least
        self.resize = check_number("resize", resize, low=0, high=1)
        self.cross = check_number("cross", cross, low=0, high=1 - self.resize)
        self.base = base
        self.sizes = check_int("sizes", sizes, low=2)
        self._bases: dict[int, Genome] = {}

    def starts(self, count: int) -> list[Genome]:
        """Return genomes of evenly spaced sizes, the largest first; without a base, uniform ones that are filled up."""
        found = []
        for slot, size in enumerate(np.linspace(self.problem.budget, self.least, count).astype(np.int64).tolist()):
            here = self.problem.within(size)
            genome = here.uniform() if self.base is None else self.base(here)
            fill(here, genome, generator(self.seed, "start", slot))
            found.append(genome)
        return found

    def offspring(self, *, generation: int, parents: Sequence[Genome], slot: int, parent: int) -> Genome:
        """Return the offspring of a slot, within the budget.

        Args:
            generation: 1, 2 ...
            parents: The front, in any order.
            slot: Index among the generation's proposals.
            parent: Index of its parent.
        """
        rng = generator(self.seed, "offspring", generation, slot)
        genome = parents[parent]
        size = self.problem.cost(genome)
        kind = rng.random()
        if kind < self.resize:
            reach = SPAN * (self.problem.budget - self.least)
            wanted = int(np.clip(size + rng.uniform(-reach, reach), self.least, self.problem.budget))
            genome = self._resized(genome, size, wanted, rng)
        elif kind < self.resize + self.cross and len(parents) > 1:
            other = parents[int(rng.integers(len(parents)))]
            low, high = sorted((size, self.problem.cost(other)))
            genome = np.where(rng.random(len(genome)) < 0.5, genome, other)
            return self._fitted(genome, int(rng.integers(low, high + 1)), rng)
        return self.mutation(self.problem.within(max(self.problem.cost(genome), self.problem.least)), genome, rng)

    def _resized(self, genome: Genome, size: int, wanted: int, rng: np.random.Generator) -> Genome:
        """Return a genome of another size.

        Args:
            genome: Of a parent.
            size: Its bits.
            wanted: Bits that the result may have.
            rng: Chooses what is lowered or raised.
        """
        if self.base is not None:
            changes = genome - self._base_of(size)
            genome = np.clip(self._base_of(wanted) + changes, 0, self.problem.sizes - 1)
        return self._fitted(genome, wanted, rng)

    def _fitted(self, genome: Genome, wanted: int, rng: np.random.Generator) -> Genome:
        here = self.problem.within(max(wanted, self.problem.least))
        fitted = genome.copy()
        if not here.gated:  # what a gate drops or brings back is worked out step by step
            shift(here, fitted, rng)
        repair(here, fitted, rng)
        fill(here, fitted, rng)
        return fitted

    def _base_of(self, size: int) -> Genome:
        """Return the base of the nearest of the sizes that bases are made for, from below."""
        assert self.base is not None
        step = max(1, (self.problem.budget - self.least) // (self.sizes - 1))
        index = max(0, min(self.sizes - 1, (size - self.least) // step))
        if index not in self._bases:
            self._bases[index] = self.base(self.problem.within(self.least + index * step))
        return self._bases[index]


def shift(problem: Problem, genome: Genome, rng: np.random.Generator) -> None:
    """Lower or raise random units by one step each, many at once, until a genome is about at the budget; in place.

    Args:
        problem: Units and ladders, none of which gates another.
        genome: Shape (units,); changed in place.
        rng: Chooses the units.
    """
    for _ in range(int(problem.sizes.max())):
        slack = problem.budget - int(problem.costs[problem.indices, genome].sum())
        table = problem.falls if slack < 0 else problem.rises
        moves = problem.next_down if slack < 0 else problem.next_up
        steps = table[problem.indices, genome]
        order = rng.permutation(np.flatnonzero(steps > 0))
        total = np.cumsum(steps[order])
        count = int(np.searchsorted(total, abs(slack), side="right")) + (1 if slack < 0 else 0)
        moved = order[:count]
        if not len(moved):
            return
        genome[moved] = moves[moved, genome[moved]]
        if count < len(order):
            return
