"""Least harm by a quadratic model, in which pairs of blocks or of kinds of layers interact (CLADO, CoopQ)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from evosweep.allocators.base import check_has_layers
from evosweep.allocators.ilp import least_harm
from evosweep.allocators.interactions import PAIRS, Additivity, Floats, Interactions, pair_columns
from evosweep.allocators.quiet import silenced_stdout
from evosweep.core.checks import check_choice, check_int
from evosweep.core.problem import Genome, Problem

RELAXED = 12  # rounds in which levels may be mixed, which only give cuts
EXACT = 1e-6  # gap at which the optimum counts as proved
STEPS = 1_000  # of the local search
CONSIDERED = 1_000  # changes of which exchanges are tried: half that raise costs, half that lower them


class Pairs:
    """Minimizes single effects plus interactions of pairs of groups within the budget.

    The model is convex, so it is the largest of its tangents: an integer program with a cut for every genome seen so
    far (outer approximation: Duran and Grossmann, 1986) gives a lower bound and the next genome, until the two meet or
    ``rounds`` are over. Single moves and exchanges improve what is found.

    Args:
        group: What interacts: ``blocks`` or ``kinds`` (``self_attn.q_proj`` of all blocks).
        rounds: Integer programs at most.
        node_limit: Branch-and-bound nodes of each at most.
    """

    def __init__(self, *, group: str = "blocks", rounds: int = 12, node_limit: int = 2_000) -> None:
        self.group = check_choice("group", group, PAIRS)
        self.columns = pair_columns(group)
        self.rounds = check_int("rounds", rounds, low=0)
        self.node_limit = check_int("node_limit", node_limit, low=1)
        self.name = f"pairs_{group}"
        self._facts: dict[str, float] = {}

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if units can only be kept or dropped."""
        check_has_layers(problem, self)

    @property
    def facts(self) -> Mapping[str, float]:
        """How far effects add up, and how far the allocation may be from the model's optimum, after ``allocate``."""
        return self._facts

    def allocate(self, problem: Problem) -> Genome:
        """Return the best genome of the quadratic model that was found.

        Raises:
            StoreError: A column was not measured.
        """
        model = Interactions.of(problem, self.group)
        found = least_quadratic(problem, model, rounds=self.rounds, node_limit=self.node_limit)
        self._facts = {**Additivity.of(problem, model).facts, "pairs/gap": found.value - found.bound}
        return found.genome


@dataclass(frozen=True)
class Found:
    """What an integer program found.

    Attributes:
        genome: The best that was found within the budget, shape (units,).
        value: Its loss by the quadratic model, as a rise over the dense model.
        bound: Lower bound of that loss for every genome within the budget; ``value`` - ``bound`` is the gap.
    """

    genome: Genome
    value: float
    bound: float


def least_quadratic(problem: Problem, model: Interactions, *, rounds: int, node_limit: int) -> Found:
    """Return the best genome found within the budget, and a lower bound of the optimum.

    Args:
        problem: Units, ladders, budget.
        model: The quadratic model.
        rounds: Integer programs at most.
        node_limit: Branch-and-bound nodes of each at most.
    """
    program = _Program(problem, model)
    best = descend(problem, model, least_harm(problem, model.harms, node_limit=node_limit))
    value = model.value(best)
    program.cut(model.sums(best))
    bound = 0.0
    for attempt in range(RELAXED + rounds):
        shares, lower = program.solve(whole=attempt >= RELAXED, node_limit=node_limit)
        bound = max(bound, lower)
        if shares is None or value - bound <= EXACT * max(value, EXACT):
            break
        program.cut(program.sums(shares))
        if attempt >= RELAXED:
            genome = descend(problem, model, program.genome(shares))
            if problem.feasible(genome) and model.value(genome) < value:
                best = genome
                value = model.value(genome)
                program.cut(model.sums(genome))
    return Found(best, value, min(bound, value))


class _Program:
    """The linear program whose cuts are tangents of the model's quadratic part.

    Args:
        problem: Units, ladders, budget.
        model: The quadratic model.
    """

    def __init__(self, problem: Problem, model: Interactions) -> None:
        self.problem = problem
        self.model = model
        self.units, self.levels = (problem.costs >= 0).nonzero()
        count = len(self.units)
        roots = model.roots[self.units, self.levels]
        self._roots = csr_array((roots, (model.groups[self.units], np.arange(count))), (len(model.labels), count))
        self._each = csr_array((np.ones(count), (self.units, np.arange(count))), (len(problem.units), count))
        self._cuts: list[npt.NDArray[np.float64]] = []
        self._offsets: list[float] = []

    def cut(self, sums: Floats) -> None:
        """Add the tangent at given sums of the groups: q(S) ≥ 2 S₀ᵀ ρ S − S₀ᵀ ρ S₀."""
        slope = self.model.matrix @ sums
        self._cuts.append(np.asarray(self._roots.T @ (2 * slope)))
        self._offsets.append(float(sums @ slope))

    def sums(self, shares: Floats) -> Floats:
        """Return Σ √h of each group, shape (groups,), for the share of each level of each unit."""
        return np.asarray(self._roots @ shares)

    def genome(self, shares: Floats) -> Genome:
        """Return the genome that a solution of 0 and 1 stands for, shape (units,).

        Args:
            shares: Share of each level of each unit, shape (all levels,); what is above 0.5 counts as 1.
        """
        genome = np.zeros(len(self.problem.units), dtype=np.int64)
        chosen = shares > 0.5
        genome[self.units[chosen]] = self.levels[chosen]
        return genome

    def solve(self, *, whole: bool, node_limit: int) -> tuple[Floats | None, float]:
        """Return the best shares of levels under the cuts so far, None without any, and a lower bound of the optimum.

        Args:
            whole: Whether every share must be 0 or 1.
            node_limit: Branch-and-bound nodes at most.
        """
        count = len(self.units)
        problem = self.problem
        costs = problem.costs[self.units, self.levels].astype(np.float64)
        cuts = np.column_stack([np.stack(self._cuts), -np.ones(len(self._cuts))])
        linear = self.model.linear[self.units, self.levels]
        with silenced_stdout():
            solution = milp(
                np.append(linear, 1.0),
                integrality=np.append(np.full(count, float(whole)), 0),
                bounds=Bounds(0, np.append(np.ones(count), np.inf)),
                constraints=[
                    LinearConstraint(hstack([self._each, csr_array((len(problem.units), 1))]), 1, 1),
                    LinearConstraint(np.append(costs / problem.budget, 0.0)[None], -np.inf, 1.0),
                    LinearConstraint(vstack([csr_array(cuts)]), -np.inf, np.array(self._offsets)),
                ],
                options={"node_limit": node_limit, "mip_rel_gap": 1e-6},
            )
        if solution.x is None:
            return None, 0.0
        bound = solution.fun if not whole else solution.mip_dual_bound
        return solution.x[:-1], 0.0 if bound is None else float(bound)


def descend(problem: Problem, model: Interactions, genome: Genome) -> Genome:
    """Return a genome after the best single changes and exchanges of two, until none lowers the model's harm.

    Args:
        problem: Units, ladders, budget.
        model: The quadratic model.
        genome: Within the budget.
    """
    genome = genome.copy()
    for _ in range(STEPS):
        change = _best_change(problem, model, genome)
        if change is None:
            break
        for unit, level in change:
            genome[unit] = level
    return genome


def _best_change(problem: Problem, model: Interactions, genome: Genome) -> Sequence[tuple[int, int]] | None:
    """Return the single change or exchange that lowers the harm most; None where none does."""
    units, levels = (problem.costs >= 0).nonzero()
    moves = levels != genome[units]
    changes = _Changes.of(problem, model, genome, units[moves], levels[moves])
    slack = problem.budget - problem.cost(genome)
    tolerance = -1e-12 * max(model.value(genome), 1e-12)
    fitting = np.flatnonzero(changes.bits <= slack)
    best = int(fitting[changes.deltas[fitting].argmin()]) if len(fitting) else -1
    least = changes.deltas[best] if len(fitting) else np.inf
    changes_of_two = changes.considered()
    both = changes_of_two.together(model)
    both[changes_of_two.bits[:, None] + changes_of_two.bits > slack] = np.inf
    pair = both.min(initial=np.inf)
    if min(least, pair) >= tolerance:
        return None
    if least <= pair:
        return [(int(changes.units[best]), int(changes.levels[best]))]
    two = np.unravel_index(int(both.argmin()), both.shape)
    return [(int(changes_of_two.units[one]), int(changes_of_two.levels[one])) for one in two]


@dataclass(frozen=True)
class _Changes:
    """Changes of single units: which level, and what each adds to √h, to the harm and to the cost, shape (changes,)."""

    units: npt.NDArray[np.int64]
    levels: npt.NDArray[np.int64]
    steps: Floats
    deltas: Floats
    bits: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        problem: Problem,
        model: Interactions,
        genome: Genome,
        units: npt.NDArray[np.int64],
        levels: npt.NDArray[np.int64],
    ) -> "_Changes":
        """Return what setting each of some units to a level does to a genome.

        Args:
            problem: Units, ladders, budget.
            model: The quadratic model.
            genome: Shape (units,).
            units: Indices, shape (changes,).
            levels: Shape (changes,).
        """
        steps = model.roots[units, levels] - model.roots[units, genome[units]]
        groups = model.groups[units]
        slope = 2 * (model.matrix @ model.sums(genome))[groups]
        linear = model.linear[units, levels] - model.linear[units, genome[units]]
        deltas = linear + slope * steps + np.diag(model.matrix)[groups] * steps**2
        return cls(units, levels, steps, deltas, problem.costs[units, levels] - problem.costs[units, genome[units]])

    def considered(self) -> "_Changes":
        """Return the changes that exchanges are made of: the best, and those that cost the least a bit they save."""
        if len(self.units) <= CONSIDERED:
            return self
        saved = np.maximum(-self.bits, 0)
        rate = np.divide(self.deltas, saved, out=np.full(len(saved), np.inf), where=saved > 0)
        half = CONSIDERED // 2
        kept = np.union1d(np.argsort(self.deltas)[:half], np.argsort(rate)[:half])
        return _Changes(self.units[kept], self.levels[kept], self.steps[kept], self.deltas[kept], self.bits[kept])

    def together(self, model: Interactions) -> Floats:
        """Return what pairs of changes do to the model's harm, shape (changes, changes); infinity for one unit's."""
        groups = model.groups[self.units]
        cross = 2 * model.matrix[np.ix_(groups, groups)] * np.outer(self.steps, self.steps)
        both: Floats = self.deltas[:, None] + self.deltas + cross
        both[self.units[:, None] == self.units] = np.inf
        return both
