"""Second-order sensitivities augmented by what layers do to one another, and a bisection over them."""

import numpy as np

from evosweep.allocators.base import check_has_layers
from evosweep.allocators.harm import Harm
from evosweep.allocators.ilp import improved
from evosweep.allocators.interactions import PAIRS, Floats, Interactions, pair_columns
from evosweep.core.checks import check_choice
from evosweep.core.problem import Genome, Problem


class InterLayer:
    """Takes every unit's cheapest level whose augmented sensitivity is at most a bound, bisected to the budget.

    "Augmenting Hessians with Inter-Layer Dependencies" (Schaefer et al., arXiv 2306.04879) adds to a layer's
    second-order sensitivity what its errors do together with those of other layers, and bisects over layers in the
    order of the result. Here the sensitivity of unit u at level l is h_u(l) + Σ_v ρ_uv √(h_u(l) h_v), v at the
    uniform allocation: half of each pair's term of the second-order expansion (``Interactions``), with ρ as measured
    for pairs of groups. So the sensitivities of all units at the uniform allocation add up to its harm. The bisection
    is over the bound at a budget of bits; what is left of the budget goes to the units that gain most. Differs from the
    paper, which bisects for the lowest latency at a given accuracy and evaluates the model at every step; its authors
    publish no code, and its formula of the augmentation was not at hand.

    Args:
        harm: Second-order sensitivity, as ``Harm`` explains.
        group: What interacts: ``blocks`` or ``kinds``.
    """

    def __init__(self, *, harm: str = "hawq_v2", group: str = "blocks") -> None:
        self.harm = Harm(harm)
        self.group = check_choice("group", group, PAIRS)
        self.columns = list(dict.fromkeys([*self.harm.columns, *pair_columns(group)]))
        self.name = "inter_layer"

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if units have no sensitivities: some can only be dropped, or are no layers."""
        check_has_layers(problem, self)
        self.harm.check(problem, owner=self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the allocation whose augmented sensitivities lie under one bound, the lowest that the budget allows.

        Raises:
            StoreError: A column was not measured.
        """
        model = Interactions.of(problem, self.group)
        table = augmented(self.harm.table(problem), model.groups, model.matrix, problem.uniform())
        return improved(problem, table, bounded(problem, table))


def augmented(harms: Floats, groups: np.ndarray, matrix: Floats, others: Genome) -> Floats:
    """Return h_u(l) + Σ_{v≠u} ρ_uv √(h_u(l) h_v), at least 0, shape as ``harms``; infinity past a ladder's end.

    Args:
        harms: Sensitivity of every level, shape (units, longest ladder).
        groups: Index of every unit's group, shape (units,).
        matrix: ρ of pairs of groups.
        others: Level of v, shape (units,).
    """
    there = np.isfinite(harms)
    roots = np.sqrt(np.where(there, np.maximum(harms, 0.0), 0.0))
    own = roots[np.arange(len(others)), others]
    sums = np.bincount(groups, own, minlength=len(matrix))
    pull = (matrix @ sums)[groups] - np.diag(matrix)[groups] * own
    return np.where(there, np.maximum(harms + roots * pull[:, None], 0.0), np.inf)


def bounded(problem: Problem, sensitivities: Floats) -> Genome:
    """Return every unit's cheapest level of a sensitivity within the lowest bound that fits the budget.

    Args:
        problem: Units, ladders, budget.
        sensitivities: Of every level, shape (units, longest ladder).
    """
    bounds = np.unique(sensitivities[np.isfinite(sensitivities)])
    best = np.where(np.isfinite(sensitivities), sensitivities, np.inf).argmin(axis=1)

    def at(bound: float) -> Genome:
        within = sensitivities <= bound
        return np.where(within.any(axis=1), within.argmax(axis=1), best)

    low = 0
    high = len(bounds) - 1  # where every unit is at its cheapest level
    while low < high:
        middle = (low + high) // 2
        if problem.feasible(at(float(bounds[middle]))):
            high = middle
        else:
            low = middle + 1
    return at(float(bounds[low]))
