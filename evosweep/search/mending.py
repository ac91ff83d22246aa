"""Makes a genome hold a problem's budget and its further limits again, by random steps."""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem

Mask = npt.NDArray[np.bool_]


def mend(problem: Problem, genome: Genome, rng: np.random.Generator, *, free: Mask | None = None) -> bool:
    """Move random units until the budget and all limits hold, in place; return whether they do.

    A step lowers what is exceeded and leaves what holds within its bound; it goes to a neighbouring level where one
    does, else to any.

    Args:
        problem: Units, ladders, budget, limits.
        genome: Shape (units,); changed in place.
        rng: Chooses the steps.
        free: Units that may be moved, shape (units,); None: all.
    """
    tables = np.stack([np.maximum(problem.costs, 0), *(limit.table for limit in problem.limits)])
    bounds = np.array([problem.budget, *(limit.most for limit in problem.limits)])
    possible = problem.costs >= 0 if free is None else (problem.costs >= 0) & free[:, None]
    levels = np.arange(problem.costs.shape[1])
    for _ in range(problem.total_levels):
        now = tables[:, problem.indices, genome]
        over = now.sum(axis=1) - bounds
        if (over <= 0).all():
            return True
        steps = tables - now[:, :, None]
        exceeded = over > 0
        legal = possible & (steps <= np.maximum(-over, 0)[:, None, None]).all(axis=0)
        legal &= (steps[exceeded] < 0).any(axis=0)
        near = legal & (np.abs(levels[None] - genome[:, None]) == 1)
        units, chosen = (near if near.any() else legal).nonzero()
        if not len(units):
            return False
        pick = int(rng.integers(len(units)))
        genome[units[pick]] = chosen[pick]
    return problem.feasible(genome)


def affordable_steps(problem: Problem, genome: Genome) -> Mask:
    """Return which units' steps to their next dearer level the limits allow, shape (units,)."""
    up = np.maximum(problem.next_up[problem.indices, genome], 0)
    allowed = np.ones(len(genome), dtype=bool)
    for limit in problem.limits:
        now = limit.table[problem.indices, genome]
        allowed &= limit.table[problem.indices, up] - now <= limit.most - int(now.sum())
    return allowed
