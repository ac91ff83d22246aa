"""Genomes as short text: one base-36 number a unit, readable and exact."""

from collections.abc import Mapping, Sequence

import numpy as np

from evosweep.core.problem import Genome, Problem

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_LETTERS = np.frombuffer(DIGITS.encode("ascii"), dtype=np.uint8)
_VALUES = np.full(256, len(DIGITS), dtype=np.int64)  # of a character; what is no digit is too large
_VALUES[_LETTERS] = np.arange(len(DIGITS))


def genome_to_text(problem: Problem, genome: Genome) -> str:
    """Return the level index of every unit in base 36, in the problem's order, all with equally many digits."""
    width = digits_of(int(problem.sizes.max()))
    if width == 1:
        return _LETTERS[genome].tobytes().decode("ascii")
    return "".join(np.base_repr(index, len(DIGITS)).lower().rjust(width, "0") for index in genome.tolist())


def genome_from_text(problem: Problem, text: str) -> Genome:
    """Return what ``genome_to_text`` wrote.

    Raises:
        ValueError: The text is no genome of this problem.
    """
    width = digits_of(int(problem.sizes.max()))
    digits = _VALUES[np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)]
    fits = digits.size == width * len(problem.units) and (digits < len(DIGITS)).all()
    genome = digits.reshape(-1, width) @ len(DIGITS) ** np.arange(width)[::-1] if fits else problem.sizes
    if (genome >= problem.sizes).any():
        raise ValueError(f"{text[:40]!r} is no genome of {len(problem.units)} units")
    return np.asarray(genome, dtype=np.int64)


def digits_of(levels: int) -> int:
    """Return how many base-36 digits an index below ``levels`` needs."""
    return len(np.base_repr(max(levels - 1, 1), len(DIGITS)))


def hashes_of(problem: Problem, genomes: Sequence[Genome], *, known: Mapping[bytes, str]) -> dict[bytes, str]:
    """Return the hashes of genomes' allocations, by the genomes' bytes.

    Args:
        problem: Units and levels.
        genomes: Shape (units,) each.
        known: What this returned before: these are not made again.
    """
    keys = {genome.tobytes(): genome for genome in genomes}
    return {key: known.get(key) or problem.decode(genome).hash for key, genome in keys.items()}
