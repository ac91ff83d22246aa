"""Integer programming: the least sum of estimated harm within the budget (multiple-choice knapsack)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

from evosweep.allocators.harm import DEFAULT, Harm
from evosweep.allocators.quiet import silenced_stdout
from evosweep.core.checks import check_int
from evosweep.core.errors import BudgetError, EvosweepError
from evosweep.core.limits import Limit, within_limits
from evosweep.core.problem import Genome, Problem

Floats = npt.NDArray[np.float64]
BISECTIONS = 100
SCALE = 1e3  # the solver's objective runs from 0 to this, far above its absolute gap of 1e-6
ROUNDING = 1e-12  # relative error of sums of harms


class ILP:
    """Minimizes the sum over units of the harm estimated for their levels, exactly.

    The solver alone is exact only up to 1e-6 of the largest harm. So a Lagrangian bound and a feasible genome close to
    it first rule out every level that no better genome can have, and the solver gets what is left, scaled to the
    distance between the two.

    Args:
        harm: Model of harm: ``scaled``, ``bare``, ``around_uniform`` or ``around_top``, as ``Harm`` explains.
        node_limit: Branch-and-bound nodes at most; the optimum is nearly always proved long before.
    """

    holds_limits = True

    def __init__(self, *, harm: str = DEFAULT, node_limit: int = 100_000) -> None:
        self.harm = Harm(harm)
        self.name = self.harm.named("ilp")
        self.columns = self.harm.columns
        self.node_limit = check_int("node_limit", node_limit, low=1)

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if its model of harm does not apply to such a problem."""
        self.harm.check(problem, owner=self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the optimum of the additive model.

        Raises:
            EvosweepError: A level has no layer error, or the solver gives up.
        """
        return least_harm(problem, self.harm.table(problem), node_limit=self.node_limit)


def least_harm(problem: Problem, table: Floats, *, node_limit: int) -> Genome:
    """Return the genome within the budget with the least sum of harms.

    Args:
        problem: Units, ladders, budget.
        table: Harm of every level, shape (units, longest ladder); infinity past a ladder's end.
        node_limit: Branch-and-bound nodes at most.

    Raises:
        EvosweepError: The solver gives up.
    """
    harm = table - table.min(axis=1, keepdims=True)
    bound = _bound(problem, harm)
    finite = np.isfinite(harm)
    known = min(_total(harm, bound.genome), float(np.where(finite, harm, 0.0).max(axis=1).sum()))
    gap = known - bound.value
    tolerance = ROUNDING * known
    possible = finite & (bound.excess <= gap + tolerance)
    possible[problem.indices, bound.genome] = True
    possible &= finite
    if gap <= tolerance or (possible.sum(axis=1) == 1).all():
        return bound.genome
    found = _solve(problem, bound, possible, gap=gap, node_limit=node_limit)
    return found if _total(harm, found) < _total(harm, bound.genome) else bound.genome


@dataclass(frozen=True)
class _Bound:
    """Bounds of a problem by Lagrangian relaxation, and a genome close to them.

    Attributes:
        price: λ, harm a bit.
        value: Lower bound of the total harm within the budget.
        excess: How much the bound rises if a unit takes a level, shape (units, longest ladder); infinity past its end.
        genome: A genome within the budget, near the bound.
    """

    price: float
    value: float
    excess: Floats
    genome: Genome


def _bound(problem: Problem, harm: Floats) -> _Bound:
    """Return the best Lagrangian bound of the total harm: max over λ ≥ 0 of Σ min(harm + λ cost) − λ budget.

    Args:
        problem: Units, ladders, budget.
        harm: At least 0, shape (units, longest ladder); infinity past a ladder's end.
    """
    above = (problem.costs - problem.costs[:, :1]).astype(np.float64)
    spendable = float(problem.budget - int(problem.costs[:, 0].sum()))
    low = 0.0
    high = float(harm[np.isfinite(harm)].max()) + 1.0  # at λ = high, no bit is worth its price
    genome = (harm + high * above).argmin(axis=1)
    price = 0.0
    value = 0.0
    for trial in (low, *[None] * BISECTIONS):
        middle = (low + high) / 2 if trial is None else trial
        priced = harm + middle * above
        bound = float(priced.min(axis=1).sum()) - middle * spendable
        if bound > value:
            price = middle
            value = bound
        chosen = priced.argmin(axis=1)
        if not problem.feasible(chosen):
            low = middle
            continue
        high = middle
        genome = min(genome, chosen, key=lambda option: _total(harm, option))
    if not problem.feasible(genome):
        genome = _within_limits(problem)
    priced = harm + price * above
    return _Bound(price, value, priced - priced.min(axis=1, keepdims=True), improved(problem, harm, genome))


def _within_limits(problem: Problem) -> Genome:
    """Return a genome within the budget and all limits; raises BudgetError where there is none."""
    genome = within_limits(problem.costs, problem.budget, problem.limits)
    if genome is None:
        names = " and ".join(limit.name for limit in problem.limits)
        raise BudgetError(f"no allocation within {problem.budget} bits was found that also holds {names}")
    return genome


def _limited(limit: Limit, units: npt.NDArray[np.int64], levels: npt.NDArray[np.int64]) -> LinearConstraint:
    """Return a limit as the solver's constraint, as shares of what it allows.

    Args:
        limit: The bound.
        units: Unit of every variable but the last, which is what the budget leaves.
        levels: Its level.
    """
    shares = limit.table[units, levels] / max(limit.most, 1)
    return LinearConstraint(np.append(shares, 0.0)[None], -np.inf, 1.0)


def improved(problem: Problem, harm: Floats, genome: Genome) -> Genome:
    """Return a genome after changing one unit at a time, most harm saved first, while the budget allows it.

    Args:
        problem: Units, ladders, budget.
        harm: Of every level, shape (units, longest ladder); infinity past a ladder's end.
        genome: Within the budget, shape (units,).
    """
    genome = genome.copy()
    for _ in range(problem.total_levels):
        extra = problem.costs - problem.costs[problem.indices, genome][:, None]
        saved = harm[problem.indices, genome][:, None] - harm
        legal = (problem.costs >= 0) & (extra <= problem.budget - problem.cost(genome)) & (saved > 0)
        for limit in problem.limits:
            now = limit.table[problem.indices, genome]
            legal &= limit.table - now[:, None] <= limit.most - int(now.sum())
        if not legal.any():
            break
        unit, level = np.unravel_index(int(np.where(legal, saved, -1.0).argmax()), saved.shape)
        genome[unit] = level
    return genome


def _solve(problem: Problem, bound: _Bound, possible: npt.NDArray[np.bool_], *, gap: float, node_limit: int) -> Genome:
    """Return the best genome of possible levels.

    The objective is what a genome adds to the bound: its units' excess, and λ for every bit that it leaves unspent.

    Args:
        problem: Units, ladders, budget.
        bound: Of that problem.
        possible: Levels that the best genome may have, shape (units, longest ladder).
        gap: How far the best genome may be above the bound.
        node_limit: Branch-and-bound nodes at most.

    Raises:
        EvosweepError: The solver gives up.
    """
    units, levels = possible.nonzero()
    count = len(units)
    lowest = np.where(possible, problem.costs, np.iinfo(np.int64).max).min(axis=1)
    above = problem.costs[units, levels] - lowest[units]
    step = max(1, int(np.gcd.reduce(above)))  # smaller numbers, same problem
    spendable = (problem.budget - int(lowest.sum())) // step
    one_each = csr_array((np.ones(count), (units, np.arange(count))), shape=(len(problem.units), count))
    objective = np.append(bound.excess[units, levels], bound.price * step) * (SCALE / gap)
    with silenced_stdout():
        solution = milp(
            objective,
            integrality=np.append(np.ones(count), 0),
            bounds=Bounds(0, np.append(np.ones(count), np.inf)),
            constraints=[
                LinearConstraint(hstack([one_each, csr_array((len(problem.units), 1))]), 1, 1),
                LinearConstraint(np.append(above / step, 1.0)[None], spendable, spendable),
                *(_limited(limit, units, levels) for limit in problem.limits),
            ],
            options={"mip_rel_gap": 0, "node_limit": node_limit},
        )
    if solution.x is None:
        raise EvosweepError(f"sampler ilp found no solution: {solution.message}")
    genome = np.zeros(len(problem.units), dtype=np.int64)
    chosen = solution.x[:-1] > 0.5
    genome[units[chosen]] = levels[chosen]
    return genome if problem.feasible(genome) else bound.genome


def _total(harm: Floats, genome: Genome) -> float:
    return float(harm[np.arange(len(genome)), genome].sum())
