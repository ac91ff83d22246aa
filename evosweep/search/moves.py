"""Moves on genomes that keep the exact budget: swap, exchange, repair, fill."""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem

Steps = npt.NDArray[np.int64]
MUTATION_TRIES = 16
FLIPS = ("min_of_two", "uniform")
GROUPS = ("size", "name", "none")


def steps_up(problem: Problem, genome: Genome) -> Steps:
    """Return what raising each unit one level costs, shape (units,); -1 where it is at its top or not there."""
    steps = problem.rises[problem.places, genome]
    return _among_the_living(problem, genome, steps, shut=0)


def steps_down(problem: Problem, genome: Genome) -> Steps:
    """Return what lowering each unit one level frees, shape (units,); -1 where it is at its bottom or not there."""
    steps = problem.falls[problem.places, genome]
    return _among_the_living(problem, genome, steps, shut=1)


def _among_the_living(problem: Problem, genome: Genome, steps: Steps, *, shut: int) -> Steps:
    """Return steps with what gates bring or take along; -1 for units that are not there."""
    if not problem.gated:
        return steps
    can = (steps >= 0) & problem.alive(genome)
    return np.where(can, steps + _behind(problem, genome, shut=shut), -1)


def _behind(problem: Problem, genome: Genome, *, shut: int) -> Steps:
    """Return the cost of what each unit gates, where it stands at level ``shut``, one step from its lowest."""
    units = np.arange(len(genome))
    gated = problem.gate != units
    behind = np.bincount(
        problem.gate[gated], weights=problem.costs[units, genome][gated], minlength=len(genome)
    ).astype(np.int64)
    return np.where(genome == shut, behind, 0)


def swap(problem: Problem, genome: Genome, rng: np.random.Generator, *, siblings: bool = False) -> bool:
    """Raise one unit and lower another by the same cost, in place; false if no two such units are left.

    With ``siblings``, both have the same name inside their blocks (``q_proj`` and ``q_proj``).
    """
    up, down = steps_up(problem, genome), steps_down(problem, genome)
    for raised in rng.permutation(_where(up >= 0)):
        alike = down == up[raised]
        partners = _where(alike & (problem.kinds == problem.kinds[raised]) if siblings else alike)
        partners = partners[partners != raised]
        if len(partners):
            genome[raised] += 1
            genome[_pick(partners, rng)] -= 1
            return True
    return False


def exchange(problem: Problem, genome: Genome, rng: np.random.Generator) -> bool:
    """Raise one unit, lower others until the budget holds again, spend what is left over; in place.

    Returns:
        False, with the genome as it was, if no unit could be raised so.
    """
    before, up = genome.copy(), steps_up(problem, genome)
    slack = problem.budget - problem.cost(genome)
    for raised in rng.permutation(_where(up >= 0)):
        genome[raised] += 1
        left = _repair(problem, genome, rng, slack=slack - int(up[raised]), keep=(int(raised),))
        if left >= 0:
            _fill(problem, genome, rng, slack=left, free=genome >= before)
            return True
        genome[:] = before
    return False


def repair(problem: Problem, genome: Genome, rng: np.random.Generator, *, keep: tuple[int, ...] = ()) -> bool:
    """Lower random units (not those in ``keep``) one level at a time until the budget holds, in place."""
    return _repair(problem, genome, rng, slack=problem.budget - problem.cost(genome), keep=keep) >= 0


def _repair(problem: Problem, genome: Genome, rng: np.random.Generator, *, slack: int, keep: tuple[int, ...]) -> int:
    """Do the same for a genome that leaves ``slack`` of the budget; return what is left then; negative: it failed."""
    free = _all_but(keep, len(genome))
    for _ in range(problem.rungs):
        if slack >= 0:
            break
        down = steps_down(problem, genome)
        lowerable = _where((down > 0) & free)
        if not len(lowerable):
            break
        lowered = _pick(lowerable, rng)
        genome[lowered] -= 1
        slack += int(down[lowered])
    return slack


def fill(problem: Problem, genome: Genome, rng: np.random.Generator, *, keep: tuple[int, ...] = ()) -> None:
    """Raise random units (not those in ``keep``) while what is left of the budget allows it, in place."""
    _fill(problem, genome, rng, slack=problem.budget - problem.cost(genome), free=_all_but(keep, len(genome)))


def _fill(
    problem: Problem, genome: Genome, rng: np.random.Generator, *, slack: int, free: npt.NDArray[np.bool_]
) -> None:
    for _ in range(problem.rungs):
        up = steps_up(problem, genome)
        affordable = _where((up >= 0) & (up <= slack) & free)
        if not len(affordable):
            return
        raised = _pick(affordable, rng)
        genome[raised] += 1
        slack -= int(up[raised])


def _all_but(keep: tuple[int, ...], units: int) -> npt.NDArray[np.bool_]:
    free = np.ones(units, dtype=bool)
    free[list(keep)] = False
    return free


def _where(mask: npt.NDArray[np.bool_]) -> Steps:
    return mask.nonzero()[0]  # what numpy.flatnonzero does, without its detours: this is the innermost loop


def _pick(places: Steps, rng: np.random.Generator) -> int:
    return int(places[rng.integers(len(places))])  # as rng.choice, which takes three times as long


def random_feasible(problem: Problem, rng: np.random.Generator) -> Genome:
    """Return a random genome within the budget that cannot be raised anywhere without leaving it."""
    genome = rng.integers(0, problem.sizes)
    repair(problem, genome, rng)
    fill(problem, genome, rng)
    return genome


def mutate(
    problem: Problem,
    parent: Genome,
    rng: np.random.Generator,
    *,
    max_flips: int,
    cross: float,
    flips: str = "min_of_two",
    group: str = "size",
) -> Genome:
    """Return an offspring within the budget that differs from its parent wherever any legal move exists.

    Args:
        problem: Units, ladders, budget.
        parent: A feasible genome.
        rng: The offspring's own generator.
        max_flips: Most flips.
        cross: Probability that a flip is an exchange between units of any size instead of a swap between units
            of equal cost step. Where no swap is left, an exchange is tried anyway.
        flips: How many: ``min_of_two`` is min(U{1..max_flips}, U{1..max_flips}), few likelier than many (EvoPress,
            arXiv 2410.14649, section 3); ``uniform`` is U{1..max_flips}.
        group: What a swap is between: units of the same ``size`` (of cost step), of the same ``name`` in their blocks
            and size, or ``none``: every flip is an exchange.
    """
    draws = 2 if flips == "min_of_two" else 1
    for _ in range(MUTATION_TRIES):
        genome = parent.copy()
        for _ in range(int(rng.integers(1, max_flips + 1, size=draws).min())):
            crossing = rng.random() < cross or group == "none"
            if crossing or not swap(problem, genome, rng, siblings=group == "name"):
                exchange(problem, genome, rng)
        if (genome != parent).any():
            return genome
    return parent.copy()
