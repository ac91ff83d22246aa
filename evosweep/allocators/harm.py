"""The additive model that ILP, dynamic programming and greedy share: the harm thought to be in each level."""

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import column
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Problem

KL_PER_ERROR = "kl_per_error"


def estimated_harm(problem: Problem) -> npt.NDArray[np.float64]:
    """Return (KL per unit of layer error, measured end to end) x (layer error), shape (units, longest ladder).

    A bare sum of layer errors is no fair baseline: it can be worse than uniform. Past a ladder's end, infinity.

    Raises:
        EvosweepError: A level has no layer error.
        StoreError: The scale was not measured.
    """
    if any(level.error is None for unit in problem.units for level in unit.levels):
        raise EvosweepError("this sampler needs the layer error of every level; this store has none")
    scale = column(problem, KL_PER_ERROR)
    table = np.full(problem.costs.shape, np.inf)
    for row, unit in enumerate(problem.units):
        table[row, : len(unit.levels)] = scale[row] * np.array([level.error for level in unit.levels], dtype=np.float64)
    return table
