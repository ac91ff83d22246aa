"""Controls of a winner: the same allocation with one kind of decision made uniform, at no more bits.

What a search gains over the uniform allocation can come from which parts it drops, from widths, sparsities or ranks. A
control undoes one of them, so that its distance from the winner is that kind's share of the gain.
"""

import re

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome, Problem

NAMES = {"bits": "widths", "bits_per_weight": "widths", "sparsity": "sparsity", "rank": "rank"}
DROPS = "drop mask"
NUMBER = re.compile(r"\d+")


def controls(problem: Problem, winner: Genome) -> dict[str, Genome]:
    """Return the controls of a winner by the kind of decision; one that would change nothing is left out.

    Of widths, sparsities and ranks, the units that have such a level in the winner all take one level instead: the
    highest whose bits, over all of them, are not above the winner's. What is dropped is spread evenly over the depth
    instead, as many parts of each kind as in the winner; what this costs more is taken from the dearest levels.

    Args:
        problem: Units, ladders, budget.
        winner: Level indices, shape (units,).
    """
    found: dict[str, Genome] = {}
    kinds = _kinds(problem, winner)
    for kind in sorted(set(kinds.tolist()) - {""}):
        found[kind] = _uniform(problem, winner, np.flatnonzero(kinds == kind))
    mask = _spread(problem, winner)
    if mask is not None:
        found[DROPS] = mask
    alive = problem.alive(winner)
    return {kind: genome for kind, genome in found.items() if (genome != winner)[alive].any()}


def _kinds(problem: Problem, winner: Genome) -> npt.NDArray[np.str_]:
    """Return what each unit's level in the winner decides, shape (units,); empty for what is dropped or outside."""
    alive = problem.alive(winner)
    names = []
    for index, unit in enumerate(problem.units):
        nominal = unit.levels[winner[index]].nominal
        plain = alive[index] and not unit.outer and len(unit.levels) > 1 and nominal is not None
        names.append(NAMES.get(nominal.kind, "") if plain and nominal is not None else "")
    return np.array(names, dtype=np.str_)


def _uniform(problem: Problem, winner: Genome, members: npt.NDArray[np.int64]) -> Genome:
    """Return a winner whose members all have the same level of their kind, with no more bits than before."""
    genome = winner.copy()
    kind = NAMES[_nominal(problem, int(members[0]), int(winner[members[0]]))]
    ladders = [
        [level for level in range(int(problem.sizes[unit])) if NAMES.get(_nominal(problem, unit, level)) == kind]
        for unit in members.tolist()
    ]
    costs = [problem.costs[unit, ladder] for unit, ladder in zip(members.tolist(), ladders, strict=True)]
    ratios = [cost / problem.numels[unit] for unit, cost in zip(members.tolist(), costs, strict=True)]
    spent = int(problem.costs[members, winner[members]].sum())
    for threshold in np.unique(np.concatenate(ratios)):
        chosen = [max(int((ratio <= threshold * (1 + 1e-9)).sum()) - 1, 0) for ratio in ratios]
        if sum(int(cost[level]) for cost, level in zip(costs, chosen, strict=True)) > spent:
            break
        genome[members] = [ladder[level] for ladder, level in zip(ladders, chosen, strict=True)]
    return genome


def _nominal(problem: Problem, unit: int, level: int) -> str:
    nominal = problem.units[unit].levels[level].nominal
    return "" if nominal is None else nominal.kind


def _spread(problem: Problem, winner: Genome) -> Genome | None:
    """Return a winner with as many parts dropped of each kind, evenly over the depth; None where nothing is dropped."""
    optional = np.array([unit.only_drops and len(unit.levels) > 1 for unit in problem.units])
    if not (optional & (winner == 0)).any():
        return None
    genome = winner.copy()
    kinds = np.array([NUMBER.sub("*", unit.name) for unit in problem.units])
    for kind in np.unique(kinds[optional]):
        members = np.flatnonzero(optional & (kinds == kind))
        count = int((winner[members] == 0).sum())
        genome[members] = 1
        genome[members[np.round((np.arange(count) + 0.5) * len(members) / max(count, 1) - 0.5).astype(np.int64)]] = 0
    keep = tuple(np.flatnonzero(optional).tolist())
    return _within(problem, genome, keep)


def _within(problem: Problem, genome: Genome, keep: tuple[int, ...]) -> Genome | None:
    """Return a genome within the budget, the dearest steps lowered by turns; None where what is kept is too dear."""
    genome = genome.copy()
    free = np.ones(len(genome), dtype=bool)
    free[list(keep)] = False
    for _ in range(problem.total_levels):
        if problem.feasible(genome):
            return genome
        movable = np.flatnonzero(free & problem.alive(genome) & (problem.next_down[problem.indices, genome] >= 0))
        if not len(movable):
            return None
        bits = problem.costs[movable, genome[movable]] / problem.numels[movable]
        lowered = movable[int(bits.argmax())]
        genome[lowered] = problem.next_down[lowered, genome[lowered]]
    return genome if problem.feasible(genome) else None
