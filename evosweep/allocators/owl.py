"""OWL (Yin et al., arXiv 2310.05175): blocks with more activation-weighted outliers are compressed less."""

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import column
from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem

MULTIPLES = (3, 5, 7, 10)  # those that its authors sweep; a store has a column for each


class OWL:
    """Outlier-weighed layerwise budgets, snapped to levels within the exact budget.

    D_b, the share of |W_ij|·‖X_j‖₂ above M times its mean in block b, is mapped linearly to block targets within
    ±λ of the mean (the paper's sparsity, here cost per weight).

    Args:
        multiple: M, one of the multiples that the store has (3, 5, 7, 10).
        spread: λ in bits per weight.
    """

    def __init__(self, *, multiple: int = 5, spread: float = 0.5) -> None:
        self.multiple = check_int("multiple", multiple)
        if multiple not in MULTIPLES:
            raise SettingError("multiple", allowed=MULTIPLES, got=multiple)
        self.spread = check_number("spread", spread, low=0)
        self.columns = (f"outlier_ratio_m{self.multiple}",)

    def check(self, problem: Problem) -> None:
        """Have nothing against any problem."""

    def allocate(self, problem: Problem) -> Genome:
        """Return the allocation that spends each block's target on its units with most outliers first."""
        return snap(problem, self.targets(problem), priority=column(problem, self.columns[0]))

    def targets(self, problem: Problem) -> npt.NDArray[np.float64]:
        """Return each block's target in bits per weight, shape (blocks,); their weighted mean is the budget's."""
        return block_targets(problem, column(problem, self.columns[0]), spread=self.spread)


def block_targets(problem: Problem, merit: npt.NDArray[np.float64], *, spread: float) -> npt.NDArray[np.float64]:
    """Return block targets that rise linearly with the blocks' weighted mean merit.

    Args:
        problem: Units, ladders, budget.
        merit: Of every unit, shape (units,).
        spread: Half of the distance between the lowest and the highest target, in bits per weight.

    Returns:
        Bits per weight, shape (blocks,); their weighted mean is the budget's.
    """
    blocks = block_places(problem)
    weights = np.bincount(blocks, problem.numels)
    means = np.bincount(blocks, merit * problem.numels) / weights
    reach = float(np.ptp(means))
    scaled = (means - means.min()) / reach * 2 * spread if reach else np.zeros_like(means)
    return scaled - np.average(scaled, weights=weights) + problem.budget / float(problem.numels.sum())


def block_places(problem: Problem) -> npt.NDArray[np.int64]:
    """Return each unit's block as 0, 1, 2 ..., shape (units,)."""
    return np.unique([unit.block for unit in problem.units], return_inverse=True)[1]


def snap(problem: Problem, targets: npt.NDArray[np.float64], *, priority: npt.NDArray[np.float64]) -> Genome:
    """Return levels that come as near to block targets as the ladders and the exact budget allow.

    All units of a block get the highest level that they can share within its target; what is left of it raises single
    units one level. What blocks could not spend then goes to those furthest below their targets.

    Args:
        problem: Units, ladders, budget.
        targets: Bits per weight, shape (blocks,).
        priority: Which units of a block are raised first, highest first, shape (units,).
    """
    blocks = block_places(problem)
    target_bits = targets * np.bincount(blocks, problem.numels)
    genome = np.zeros(len(blocks), dtype=np.int64)
    spent = np.bincount(blocks, problem.costs[:, 0])
    for level in range(1, int(problem.sizes.max())):
        for unit in np.argsort(-priority, kind="stable"):
            step = problem.costs[unit, level] - problem.costs[unit, level - 1]
            reachable = genome[unit] == level - 1 and level < problem.sizes[unit]
            if reachable and spent[blocks[unit]] + step <= target_bits[blocks[unit]]:
                genome[unit] = level
                spent[blocks[unit]] += step
    return _spend(problem, _save(problem, genome, blocks), blocks, target_bits)


def _save(problem: Problem, genome: Genome, blocks: npt.NDArray[np.int64]) -> Genome:
    """Lower units, from the last block on, until the budget holds: targets below a ladder's bottom overspend."""
    for unit in np.lexsort((np.arange(len(genome)), -blocks)):
        while not problem.feasible(genome) and genome[unit] > 0:
            genome[unit] -= 1
    return genome


def _spend(
    problem: Problem, genome: Genome, blocks: npt.NDArray[np.int64], target_bits: npt.NDArray[np.float64]
) -> Genome:
    """Raise units of the blocks furthest below their targets while the budget allows it."""
    units = np.arange(len(genome))
    for _ in range(int(problem.sizes.sum())):
        above = np.minimum(genome + 1, problem.sizes - 1)
        step = problem.costs[units, above] - problem.costs[units, genome]
        affordable = (genome < problem.sizes - 1) & (step <= problem.budget - problem.cost(genome))
        if not affordable.any():
            break
        short = target_bits - np.bincount(blocks, problem.costs[units, genome])
        genome[int(np.where(affordable, short[blocks], -np.inf).argmax())] += 1
    return genome
