"""Moves the winner of one budget to another one, as a start of the search there."""

import numpy as np

from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.moves import fill, repair


def transferred(
    winner: Genome,
    problem: Problem,
    *,
    starts: tuple[Genome, Genome] | None = None,
    seed: int,
    count: int = 4,
) -> list[Genome]:
    """Return starts of a search that are made of the winner at another budget, all within the budget, none twice.

    Half of them are the winner, with random units lowered until it fits and raised while it does. The others keep what
    the other search changed: its steps away from where it began, taken from where this one begins.

    Args:
        winner: Level indices at the other budget, shape (units,).
        problem: The same units and levels under this budget.
        starts: Where the other search began, and where this one does; None: only the winner itself is moved.
        seed: Of all randomness.
        count: Starts at most.
    """
    bases = [winner]
    if starts is not None:
        before, here = starts
        bases.append(np.clip(here + (winner - before), 0, problem.sizes - 1))
    found: dict[bytes, Genome] = {}
    for slot in range(count):
        genome = bases[slot % len(bases)].copy()
        rng = generator(seed, "transfer", slot)
        if not repair(problem, genome, rng):
            continue
        fill(problem, genome, rng)
        found.setdefault(genome.tobytes(), genome)
    return list(found.values())
