"""OWL (Yin et al., arXiv 2310.05175): blocks with more activation-weighted outliers are compressed less."""

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import check_has_layers, column
from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem

MULTIPLES = (3, 5, 7, 10)  # the values that its authors sweep; level stores have a column for every one


class OWL:
    """Outlier-weighed layer budgets, rounded to levels within the exact budget.

    D_b, the share of |W_ij|·‖X_j‖₂ above M times its mean in block b, is mapped linearly to block targets within
    ±λ of the mean (the paper's sparsity, here cost per weight).

    Args:
        multiple: M, one of the multiples that level stores have a column for (3, 5, 7, 10).
        spread: λ in bits per weight.
    """

    def __init__(self, *, multiple: int = 5, spread: float = 0.5) -> None:
        self.multiple = check_int("multiple", multiple)
        if multiple not in MULTIPLES:
            raise SettingError("multiple", allowed=MULTIPLES, got=multiple)
        self.spread = check_number("spread", spread, low=0)
        self.name = "owl"
        self.columns = (f"outlier_ratio_m{self.multiple}",)

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if all units can only be kept or dropped."""
        check_has_layers(problem, self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the allocation that spends every block's target, on its units with the most outliers first."""
        return snap(problem, self.targets(problem), priority=column(problem, self.columns[0]))

    def targets(self, problem: Problem) -> npt.NDArray[np.float64]:
        """Return every block's target in bits per weight, shape (blocks,); their weighted mean is the budget's."""
        return block_targets(problem, column(problem, self.columns[0]), spread=self.spread)


def block_targets(problem: Problem, merit: npt.NDArray[np.float64], *, spread: float) -> npt.NDArray[np.float64]:
    """Return targets that rise linearly with the mean merit of a block's weights (OWL, section 3).

    Args:
        problem: Units, ladders, budget.
        merit: Of every unit, shape (units,): the higher, the more bits its block gets.
        spread: Half of the distance between the lowest and the highest target, in bits per weight.

    Returns:
        Bits per weight, shape (blocks,); their weighted mean is the budget's.
    """
    blocks = block_indices(problem)
    weights = np.bincount(blocks, problem.numels)
    means = np.bincount(blocks, merit * problem.numels) / weights
    reach = float(np.ptp(means))
    scaled = (means - means.min()) / reach * 2 * spread if reach else np.zeros_like(means)
    return scaled - np.average(scaled, weights=weights) + problem.budget / float(problem.numels.sum())


def block_indices(problem: Problem) -> npt.NDArray[np.int64]:
    """Return the index of every unit's block among the blocks that have units, shape (units,)."""
    return np.unique([unit.block for unit in problem.units], return_inverse=True)[1]


def snap(problem: Problem, targets: npt.NDArray[np.float64], *, priority: npt.NDArray[np.float64]) -> Genome:
    """Return the genome that comes nearest to the blocks' targets within the exact budget.

    All units of a block get the highest level that they can share within its target; the rest of the target raises
    single units one level. Bits that blocks could not spend then go to the blocks furthest below their targets.

    Args:
        problem: Units, ladders, budget.
        targets: Bits per weight, shape (blocks,).
        priority: Which units of a block are raised first, highest first, shape (units,).
    """
    blocks = block_indices(problem)
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
    return _raise(problem, _lower(problem, genome, blocks), blocks, target_bits)


def _lower(problem: Problem, genome: Genome, blocks: npt.NDArray[np.int64]) -> Genome:
    """Lower units, last block first, until the budget holds: a target below the lowest levels is overspent."""
    for unit in np.lexsort((np.arange(len(genome)), -blocks)):
        while not problem.feasible(genome) and genome[unit] > 0:
            genome[unit] -= 1
    return genome


def _raise(
    problem: Problem, genome: Genome, blocks: npt.NDArray[np.int64], target_bits: npt.NDArray[np.float64]
) -> Genome:
    """Raise units while the budget allows it, in the block furthest below its target first."""
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
