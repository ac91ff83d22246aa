"""AlphaPruning (Lu et al., arXiv 2410.10912): heavy-tailed spectra are compressed less.

Data-free: it reads weights alone.
"""

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import check_has_layers, column
from evosweep.allocators.owl import block_targets, snap
from evosweep.core.checks import check_number
from evosweep.core.problem import Genome, Problem

HILL = "hill_exponent"


class AlphaPruning:
    """Block budgets that fall linearly with the blocks' mean Hill exponents, rounded to levels.

    Args:
        spread: Block targets lie within this of the budget, in bits per weight (the paper's τ, there of sparsity).
    """

    name = "alpha_pruning"
    columns = (HILL,)

    def __init__(self, *, spread: float = 0.5) -> None:
        self.spread = check_number("spread", spread, low=0)

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if all units can only be kept or dropped."""
        check_has_layers(problem, self)

    def allocate(self, problem: Problem) -> Genome:
        """Return the allocation that spends every block's target, on its heaviest-tailed units first."""
        return snap(problem, self.targets(problem), priority=-column(problem, HILL))

    def targets(self, problem: Problem) -> npt.NDArray[np.float64]:
        """Return every block's target in bits per weight, shape (blocks,); their weighted mean is the budget's."""
        return block_targets(problem, -column(problem, HILL), spread=self.spread)
