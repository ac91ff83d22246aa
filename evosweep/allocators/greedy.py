"""Greedy: the step up that removes most estimated harm a bit, again and again."""

import numpy as np

from evosweep.allocators.harm import DEFAULT, Harm
from evosweep.core.problem import Genome, Problem


class Greedy:
    """From every unit at its lowest level, raises one unit at a time while any step fits the budget.

    A step may jump over levels, so that a ladder whose harm does not fall evenly hides nothing.

    Args:
        harm: Model of harm: ``scaled``, ``bare``, ``around_uniform`` or ``around_top``, as ``Harm`` explains.
    """

    def __init__(self, *, harm: str = DEFAULT) -> None:
        self.harm = Harm(harm)
        self.name = self.harm.named("greedy")
        self.columns = self.harm.columns

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if its model of harm does not apply to such a problem."""
        self.harm.check(problem, owner=self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the genome that no affordable step improves."""
        harm = self.harm.table(problem)
        units = np.arange(len(problem.units))
        genome = np.zeros(len(units), dtype=np.int64)
        for _ in range(int(problem.sizes.sum())):
            bits = problem.costs - problem.costs[units, genome][:, None]
            saved = harm[units, genome][:, None] - harm
            left = problem.budget - problem.cost(genome)
            legal = (problem.costs >= 0) & (bits > 0) & (bits <= left) & (saved > 0)
            if not legal.any():
                break
            worth = np.where(legal, saved / np.maximum(bits, 1), -np.inf)
            unit, level = np.unravel_index(int(worth.argmax()), worth.shape)
            genome[unit] = level
        return genome
