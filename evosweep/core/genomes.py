"""Genomes as short text: one base-36 number a unit, readable and exact."""

import numpy as np

from evosweep.core.problem import Genome, Problem

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def genome_to_text(problem: Problem, genome: Genome) -> str:
    """Return the level index of every unit in base 36, in the problem's order, all with equally many digits."""
    width = _width(problem)
    if width == 1:
        return "".join(DIGITS[index] for index in genome.tolist())
    return "".join(np.base_repr(index, len(DIGITS)).lower().rjust(width, "0") for index in genome.tolist())


def genome_from_text(problem: Problem, text: str) -> Genome:
    """Return what ``genome_to_text`` wrote.

    Raises:
        ValueError: The text is no genome of this problem.
    """
    width = _width(problem)
    genome = np.array([int(text[start : start + width], len(DIGITS)) for start in range(0, len(text), width)])
    if genome.shape != problem.sizes.shape or (genome >= problem.sizes).any() or (genome < 0).any():
        raise ValueError(f"{text[:40]!r} is no genome of {len(problem.units)} units")
    return genome.astype(np.int64)


def _width(problem: Problem) -> int:
    """Return how many digits the unit with the most levels needs."""
    return len(np.base_repr(max(int(problem.sizes.max()) - 1, 1), len(DIGITS)))
