"""Neighbouring blocks that depend on one another, by the entropy of what passes between them (Q-VLM)."""

import numpy as np
import numpy.typing as npt

from evosweep.core.errors import EvosweepError, StoreError
from evosweep.core.problem import Genome, Problem

ENTROPY = "activation_entropy"
JOINED = 0.5  # share of the boundaries, those of the highest entropy, over which blocks are joined
MOST_BLOCKS = 3  # of one group


def dependent_groups(problem: Problem, *, joined: float = JOINED, most: int = MOST_BLOCKS) -> npt.NDArray[np.int64]:
    """Return the index of the group of neighbouring blocks that each unit is searched with, shape (units,).

    Q-VLM (Wang et al., arXiv 2410.08119) finds that the errors of layers depend on one another the more, the higher the
    entropy of the activations between them, and searches layers together only where it is high. Here a block is joined
    to the one before where the entropy of its layers' inputs is among the highest ``joined`` of all blocks; no group
    has more than ``most`` blocks. Units outside of the blocks are one group. Differs from Q-VLM's code, which takes the
    entropy of |x| over tokens for the first and last layer of a block and a conditional one for the others, and begins
    a group where the layer before has less than the mean so far, at every third block at the latest; what it searches
    in a group are the ranges of quantized activations.

    Args:
        problem: Units with the column ``activation_entropy``.
        joined: Share of the boundaries that join.
        most: Blocks of a group at most.

    Raises:
        EvosweepError: All blocks have the same entropy, so that it groups nothing.
        StoreError: The column was not measured.
    """
    inside = [unit for unit in problem.units if not unit.outer]
    blocks = sorted({unit.block for unit in inside})
    known = {
        block: [u.columns[ENTROPY] for u in inside if u.block == block and ENTROPY in u.columns] for block in blocks
    }
    lacking = [block for block, values in known.items() if not values]
    if lacking:
        raise StoreError(f"column {ENTROPY!r} is missing for the units of {len(lacking)} blocks ({lacking[0]} ...)")
    entropy = [float(np.mean(known[block])) for block in blocks]
    if 0 < joined < 1 and most > 1 and len(blocks) > 2 and np.ptp(entropy) == 0:
        raise EvosweepError(
            f"{ENTROPY} is the same for all {len(blocks)} blocks: it groups nothing; another sampler needs no groups"
        )
    bound = float(np.quantile(entropy[1:], 1 - joined)) if len(blocks) > 1 else np.inf
    labels: dict[int, int] = {}
    group = 0
    size = 0
    for index, block in enumerate(blocks):
        if index and (entropy[index] < bound or size == most):
            group += 1
            size = 0
        labels[block] = group
        size += 1
    return np.array([group + 1 if unit.outer else labels[unit.block] for unit in problem.units], dtype=np.int64)


def part(problem: Problem, members: npt.NDArray[np.int64], genome: Genome) -> Problem:
    """Return the problem of some units alone, with what the others leave of the budget.

    Args:
        problem: Units, ladders, budget.
        members: Indices of units; gates and what they gate together.
        genome: Gives the others' levels.
    """
    prices = problem.prices(genome)
    budget = problem.budget - int(prices.sum() - prices[members].sum())
    return Problem(tuple(problem.units[index] for index in members), budget=budget)
