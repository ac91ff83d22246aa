"""Integer programming: the cheapest sum of estimated harm within the budget (multiple-choice knapsack)."""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from evosweep.allocators.harm import DEFAULT, Harm
from evosweep.core.checks import check_int
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Genome, Problem


class ILP:
    """Minimizes the sum over units of the harm thought to be in their levels.

    Args:
        harm: Which: ``scaled``, ``bare``, ``around_uniform`` or ``around_top``, as ``Harm`` explains.
        node_limit: Branch-and-bound nodes at most; the optimum is nearly always proved long before.
    """

    def __init__(self, *, harm: str = DEFAULT, node_limit: int = 100_000) -> None:
        self.harm = Harm(harm)
        self.name, self.columns = self.harm.named("ilp"), self.harm.columns
        self.node_limit = check_int("node_limit", node_limit, low=1)

    def check(self, problem: Problem) -> None:
        """Raise a SettingError where its harm says nothing about such a problem."""
        self.harm.check(problem, owner=self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the optimum of the additive model.

        Raises:
            EvosweepError: A level has no layer error, or the solver gives up.
        """
        table = self.harm.table(problem)
        units = np.repeat(np.arange(len(problem.units)), problem.sizes)
        harm, costs = table[problem.costs >= 0], problem.costs[problem.costs >= 0]
        unit_of_cost = int(np.gcd.reduce(costs))  # smaller numbers, same problem
        one_each = csr_array((np.ones(len(units)), (units, np.arange(len(units)))))
        solution = milp(
            harm / max(float(np.abs(harm).max()), np.finfo(float).tiny),
            integrality=np.ones(len(units)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs[None] / unit_of_cost, -np.inf, problem.budget // unit_of_cost),
            ],
            options={"mip_rel_gap": 0, "node_limit": self.node_limit},
        )
        if solution.x is None:
            raise EvosweepError(f"sampler ilp found no solution: {solution.message}")
        chosen = np.flatnonzero(solution.x > 0.5)
        starts = np.concatenate([[0], np.cumsum(problem.sizes)[:-1]])
        return (chosen - starts).astype(np.int64)
