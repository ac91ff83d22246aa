"""OWL (Yin et al., arXiv 2310.05175): blocks with more activation-weighted outliers are compressed less."""

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import column
from evosweep.core.checks import check_int, check_number
from evosweep.core.problem import Genome, Problem


class OWL:
    """Outlier-weighed layerwise budgets, snapped to levels within the exact budget.

    D_b, the share of |W_ij|·‖X_j‖₂ above M times its mean in block b, is mapped linearly to block targets within
    ±λ of the mean (the paper's sparsity, here cost per weight).

    Args:
        multiple: M, one of the multiples that the store has (3, 5, 7, 10).
        spread: λ in bits per weight.
    """

    def __init__(self, *, multiple: int = 5, spread: float = 0.5) -> None:
        self.multiple = check_int("sampler.multiple", multiple, low=1)
        self.spread = check_number("sampler.spread", spread, low=0)
        self.columns = (f"outlier_ratio_m{self.multiple}",)

    def allocate(self, problem: Problem) -> Genome:
        """Return the allocation nearest to the targets within the budget."""
        return snap(problem, self.targets(problem) * problem.numels)

    def targets(self, problem: Problem) -> npt.NDArray[np.float64]:
        """Return each unit's target in bits per weight, shape (units,); their weighted mean is the budget's."""
        ratios = column(problem, self.columns[0])
        _, blocks = np.unique([unit.block for unit in problem.units], return_inverse=True)
        weights = np.bincount(blocks, problem.numels)
        outliers = np.bincount(blocks, ratios * problem.numels) / weights
        reach = float(np.ptp(outliers))
        scaled = (outliers - outliers.min()) / reach * 2 * self.spread if reach else np.zeros_like(outliers)
        centred = scaled - np.average(scaled, weights=weights)
        return centred[blocks] + problem.budget / float(problem.numels.sum())


def snap(problem: Problem, targets: npt.NDArray[np.float64]) -> Genome:
    """Return the levels next to cost targets in bits, shape (units,), by largest remainder within the budget."""
    genome = np.array(
        [
            max(0, int(np.searchsorted([level.cost for level in unit.levels], target, side="right")) - 1)
            for unit, target in zip(problem.units, targets, strict=True)
        ],
        dtype=np.int64,
    )
    units = np.arange(len(genome))
    for _ in range(int(problem.sizes.sum())):  # targets below the bottom of a ladder can overspend
        if problem.feasible(genome):
            break
        excess = np.where(genome > 0, problem.costs[units, genome] - targets, -np.inf)
        genome[int(excess.argmax())] -= 1
    for _ in range(int(problem.sizes.sum())):
        above = np.minimum(genome + 1, problem.sizes - 1)
        step = problem.costs[units, above] - problem.costs[units, genome]
        open_ = (genome < problem.sizes - 1) & (step <= problem.budget - problem.cost(genome))
        if not open_.any():
            break
        remainder = np.where(open_, (targets - problem.costs[units, genome]) / np.maximum(step, 1), -np.inf)
        genome[int(remainder.argmax())] += 1
    return genome
