"""Dynamic programming: the exact optimum of the additive model, without a solver."""

import numpy as np

from evosweep.allocators.harm import DEFAULT, Harm
from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem


class DP:
    """Multiple-choice knapsack over multiples of the costs' greatest common divisor; the same optimum as ``ILP``.

    SPDY (Frantar and Alistarh, arXiv 2203.13100, section 3) finds layer-wise compression so.

    Args:
        harm: Model of harm: ``scaled``, ``bare``, ``around_uniform`` or ``around_top``, as ``Harm`` explains.
        states: Most multiples that the budget may be cut into. Bit-widths need some ten thousands; sparsities, whose
            costs share no large divisor, may need too many.
    """

    def __init__(self, *, harm: str = DEFAULT, states: int = 2_000_000) -> None:
        self.harm = Harm(harm)
        self.name = self.harm.named("dp")
        self.columns = self.harm.columns
        self.states = check_int("states", states, low=1)

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if its model of harm does not apply, or the budget is too many states."""
        self.harm.check(problem, owner=self)
        self._size(problem)

    def allocate(self, problem: Problem) -> Genome:
        """Return the optimum of the additive model."""
        harm = self.harm.table(problem)
        size, width = self._size(problem)
        steps = (problem.costs - problem.costs[:, :1]) // size
        best = np.zeros(width + 1)  # least harm of the units so far within so many steps above their cheapest levels
        chosen = np.zeros((len(problem.units), width + 1), dtype=np.min_scalar_type(int(problem.sizes.max()) - 1))
        for unit, levels in enumerate(problem.sizes):
            before = best
            best = np.full(width + 1, np.inf)
            for level in range(levels):
                step = int(steps[unit, level])
                if step > width:
                    break
                reached = np.full(width + 1, np.inf)
                reached[step:] = before[: width + 1 - step] + harm[unit, level]
                better = reached < best
                best[better] = reached[better]
                chosen[unit, better] = level
        genome = np.zeros(len(problem.units), dtype=np.int64)
        left = width
        for unit in reversed(range(len(problem.units))):
            genome[unit] = chosen[unit, left]
            left -= int(steps[unit, genome[unit]])
        return genome

    def _size(self, problem: Problem) -> tuple[int, int]:
        """Return the bits of a step, and the number of steps that can be spent above the cheapest allocation."""
        above = np.where(problem.costs >= 0, problem.costs - problem.costs[:, :1], 0)
        size = max(1, int(np.gcd.reduce(above.ravel())))
        spendable = min(problem.budget, problem.most) - int(problem.costs[:, 0].sum())
        width = spendable // size
        if width > self.states:
            raise SettingError(
                "states",
                owner=self,
                got=self.states,
                allowed=f"at least {width} for these costs, whose greatest common divisor is {size}",
                hint="sampler=ilp finds the same optimum",
            )
        return size, width
