"""What an allocator would choose at any size, from what it chooses at a few."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator

Base = Callable[[Problem], Genome]
STEPS = 16  # sizes between two knots, for which genomes are kept


class SizeBases:
    """Returns a genome for any size, interpolated between sizes (knots) for which an allocator chose one.

    Between two knots, units go from the smaller one's level to the larger one's in an order drawn once: where the
    allocator weighs harm against bits, these steps are about equally good.

    Args:
        problem: Units and ladders; its budget is the largest size.
        base: Returns what the allocator chooses under a budget.
        least: Smallest size in bits.
        knots: Number of evenly spaced sizes at which it is asked, at least 2.
        seed: Seeds the order.
    """

    def __init__(self, problem: Problem, *, base: Base, least: int, knots: int, seed: int) -> None:
        self.problem = problem
        self.base = base
        self.seed = seed
        self.knots = np.linspace(least, problem.budget, knots).astype(np.int64)
        self._chosen: dict[int, Genome] = {}
        self._table: npt.NDArray[np.int64] | None = None

    def knot(self, size: int) -> Genome:
        """Return what the allocator chooses at a size, worked out once."""
        if size not in self._chosen:
            self._chosen[size] = self.base(self.problem.within(size))
        return self._chosen[size].copy()

    def at(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the genomes of sizes, each rounded down to one of ``STEPS`` between two knots, shape (sizes, units).

        Args:
            sizes: In bits, shape (sizes,); beyond the knots, the nearest knot's.
        """
        if self._table is None:
            parts = [self._between(index) for index in range(len(self.knots) - 1)]
            self._table = np.concatenate([*parts, self.knot(int(self.knots[-1]))[None]])
        share = (sizes - self.knots[0]) / max(int(self.knots[-1] - self.knots[0]), 1)
        last = len(self._table) - 1
        return self._table[np.clip((share * last).astype(np.int64), 0, last)]

    def _between(self, index: int) -> npt.NDArray[np.int64]:
        """Return the genomes from a knot to below the next, shape (STEPS, units)."""
        low = self.knot(int(self.knots[index]))
        high = self.knot(int(self.knots[index + 1]))
        order = generator(self.seed, "base", index).permutation(np.flatnonzero(low != high))
        rank = np.full(len(low), len(order))
        rank[order] = np.arange(len(order))
        taken = rank[None] < (np.arange(STEPS) / STEPS * len(order))[:, None]
        return np.where(taken, high, low)
