"""HAWQ and HAWQ-V2: units of higher curvature never get fewer bits, and of such allocations the best within the budget.

HAWQ (arXiv 1905.03696) orders layers by S = λ / n, their top Hessian eigenvalue over their number of weights, HAWQ-V2
(arXiv 1911.03852) by their average trace; both keep levels in that order, which leaves few allocations.
HAWQ-V2 computes Ω = Σ ½ · curvature · ‖W − Ŵ‖² of all of them, draws the Pareto frontier of size and Ω, and
takes the point of least Ω within the budget. Differs from the authors' code (PyHessian, and HAWQ's ILP over trace times
‖W − Ŵ‖²) in that the Hessian is that of the KL from the dense model instead of the loss at the text's labels, in a
fixed number of products instead of iterations until the value changes by less than 0.1 %, and in the factor ½, which
makes Ω nats and changes no choice. HAWQ leaves the choice among the allocations in order to its user; here it is
HAWQ-V2's.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import column
from evosweep.allocators.harm import HAWQ as TRACE
from evosweep.allocators.harm import HAWQ_HUTCHINSON, HAWQ_TOP, ORDER, Harm
from evosweep.core.checks import check_bool, check_choice, check_int
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Genome, Problem

CURVATURES = {"top_eigenvalue": HAWQ_TOP, "trace": TRACE, "hutchinson": HAWQ_HUTCHINSON}
BITS = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Frontier:
    """Allocations that no other one beats in both size and harm, by rising size.

    Attributes:
        costs: Bits, shape (points,).
        harms: Ω, falling, shape (points,).
        genomes: Levels, shape (points, units).
    """

    costs: BITS
    harms: npt.NDArray[np.float64]
    genomes: npt.NDArray[np.int64]

    def within(self, budget: int) -> Genome:
        """Return the genome of least harm within a budget; the smallest one where none is."""
        last = int(np.searchsorted(self.costs, budget, side="right")) - 1
        genome: Genome = self.genomes[max(last, 0)]
        return genome


class HAWQ:
    """Selects from the Pareto frontier of size and second-order harm, over allocations that keep the curvature's order.

    Args:
        curvature: ``top_eigenvalue`` (HAWQ); ``trace`` (HAWQ-V2), by squared gradients; ``hutchinson`` (HAWQ-V2), by
            products with the Hessian, as its authors measure it.
        ordered: Whether units of higher curvature a weight get at least as high a level; without, all allocations
            compete, and ``sampler=ilp`` with the same harm finds the same optimum.
        points: Most points of the frontier that are kept on the way; more are thinned out evenly over the size.
    """

    def __init__(self, *, curvature: str = "hutchinson", ordered: bool = True, points: int = 10_000) -> None:
        self.curvature = CURVATURES[check_choice("curvature", curvature, CURVATURES)]
        self.ordered = check_bool("ordered", ordered)
        self.points = check_int("points", points, low=2)
        self.harm = Harm(self.curvature)
        self.columns = self.harm.columns
        names = {HAWQ_TOP: "hawq", TRACE: "hawq_v2_pareto_trace", HAWQ_HUTCHINSON: "hawq_v2_pareto"}
        self.name = names[self.curvature] + ("" if self.ordered else "_free")

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if a unit is no layer, so that no curvature can be measured of it."""
        self.harm.check(problem, owner=self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the frontier's point of least harm within the budget."""
        return self.frontier(problem).within(problem.budget)

    def frontier(self, problem: Problem) -> Frontier:
        """Return the Pareto frontier of a problem, whatever its budget, as the budget allows on the way.

        Raises:
            EvosweepError: All curvatures are the same, so that they order nothing.
            StoreError: A column was not measured.
        """
        harm = self.harm.table(problem)
        curvature = column(problem, f"{self.curvature}{ORDER}")
        if self.ordered and len(curvature) > 1 and np.ptp(curvature) == 0:
            raise EvosweepError(
                f"curvature {self.curvature} is the same for all {len(curvature)} units: it orders nothing; "
                "sampler.allocator.ordered=false needs no order"
            )
        order = np.argsort(-curvature, kind="stable")
        return _frontier(problem, harm, order, ordered=self.ordered, points=self.points)


@dataclass(frozen=True)
class _Points:
    """Partial allocations: size, harm, and where each came from."""

    costs: BITS
    harms: npt.NDArray[np.float64]
    before: BITS

    def __len__(self) -> int:
        return len(self.costs)


def _frontier(problem: Problem, harm: npt.NDArray[np.float64], order: BITS, *, ordered: bool, points: int) -> Frontier:
    """Return the frontier by dynamic programming over units, the most sensitive first.

    For every level of the last unit the partial allocations that none of the same or a higher level beats are kept:
    the next unit takes that level or a lower one.

    Args:
        problem: Units and costs.
        harm: Of every (unit, level).
        order: Units by falling curvature.
        ordered: Whether levels fall in that order.
        points: Most points kept for a level.
    """
    longest = problem.costs.shape[1]
    start = _Points(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64))
    above = [start for _ in range(longest)]  # by level: what the next unit may follow with that level
    history: list[tuple[list[_Points], list[BITS], list[BITS]]] = []
    least = np.cumsum(problem.costs[order, 0][::-1])[::-1]
    for step, unit in enumerate(order):
        left = problem.budget - (int(least[step + 1]) if step + 1 < len(order) else 0)
        taken = [
            _extended(above[level], problem, harm, unit=int(unit), level=level, left=left) for level in range(longest)
        ]
        origin_level: list[BITS] = []
        origin: list[BITS] = []
        merged: list[_Points] = []
        for level in range(longest if ordered else 1):
            found, levels, rows = _merged(list(enumerate(taken))[level:], points)
            merged.append(found)
            origin_level.append(levels)
            origin.append(rows)
        history.append((taken, origin_level, origin))
        above = merged if ordered else merged * longest
    return _traced(problem, order, above[0], history)


def _extended(
    points: _Points, problem: Problem, harm: npt.NDArray[np.float64], *, unit: int, level: int, left: int
) -> _Points:
    """Return partial allocations with one more unit at a level; none where its ladder is shorter.

    Args:
        points: Partial allocations.
        problem: Units and costs.
        harm: Of every (unit, level).
        unit: Index.
        level: Index.
        left: Most bits that they may take.
    """
    if level >= problem.sizes[unit]:
        level = int(problem.sizes[unit]) - 1
    costs = points.costs + problem.costs[unit, level]
    fits = costs <= left
    return _Points(costs[fits], points.harms[fits] + harm[unit, level], np.flatnonzero(fits))


def _merged(parts: list[tuple[int, _Points]], points: int) -> tuple[_Points, BITS, BITS]:
    """Return the points that no other beats, with the part and the row that each came from.

    Args:
        parts: Points by the level of the last unit.
        points: Most that are kept.
    """
    costs = np.concatenate([part.costs for _, part in parts])
    harms = np.concatenate([part.harms for _, part in parts])
    levels = np.concatenate([np.full(len(part), level, dtype=np.int64) for level, part in parts])
    rows = np.concatenate([np.arange(len(part)) for _, part in parts])
    by_cost = np.lexsort((harms, costs))
    best = np.minimum.accumulate(harms[by_cost])
    keep = by_cost[np.append(True, best[1:] < best[:-1])] if len(by_cost) else by_cost
    if len(keep) > points:
        keep = keep[np.unique(np.linspace(0, len(keep) - 1, points).round().astype(np.int64))]
    return _Points(costs[keep], harms[keep], rows[keep]), levels[keep], rows[keep]


def _traced(
    problem: Problem, order: BITS, last: _Points, history: list[tuple[list[_Points], list[BITS], list[BITS]]]
) -> Frontier:
    """Return the frontier with the genome of each point, walked back unit by unit.

    Args:
        problem: Units.
        order: Units in the order of the walk.
        last: Points after the last unit.
        history: For each unit: points by its level, and of each merged point its level and row.
    """
    genomes = np.zeros((len(last), len(order)), dtype=np.int64)
    rows = np.arange(len(last))
    merged = np.zeros(len(last), dtype=np.int64)  # which of the merged lists the rows are of
    for step in range(len(order) - 1, -1, -1):
        taken, origin_level, origin = history[step]
        levels = _picked(origin_level, merged, rows)
        unit = int(order[step])
        genomes[:, unit] = np.minimum(levels, problem.sizes[unit] - 1)
        rows = _picked([points.before for points in taken], levels, _picked(origin, merged, rows))
        merged = levels if len(origin) > 1 else np.zeros_like(levels)
    return Frontier(last.costs, last.harms, genomes)


def _picked(lists: list[BITS], which: BITS, rows: BITS) -> BITS:
    """Return one number for each row: ``lists[which][row]``."""
    found = np.empty_like(rows)
    for one in np.unique(which):
        found[which == one] = lists[one][rows[which == one]]
    return found
