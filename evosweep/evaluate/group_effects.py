"""Measures what groups of units do to the model alone and two by two, from which a quadratic model of harm is made."""

from itertools import combinations

import numpy as np
import numpy.typing as npt

from evosweep.allocators.interactions import ALL, PAIRS, group_labels
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.fitness.kl import KL


def pairs(
    evaluator: Evaluator,
    problem: Problem,
    *,
    group: str,
    tokens: int,
    seed: int,
    progress: Progress,
    steps: Steps | None = None,
) -> dict[str, dict[str, float]]:
    """Return the rise of the KL with each group at the uniform allocation, and of every two beyond their sum.

    Ω_gh = L(g, h) − L(g) − L(h) + L(none), all on the same tokens and all other units at their best levels (CLADO,
    arXiv 2307.05657, for groups). A unit's column ``<name>/<other group>`` is its group's Ω, or L(g) − L(none) for the
    group itself; ``<name>/all`` is the rise with all groups at once.

    Args:
        evaluator: Scores genomes.
        problem: Units.
        group: What a group is: ``blocks`` or ``kinds``.
        tokens: Tokens of the search split that each candidate is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.
    """
    names = group_labels(problem, group)
    labels = list(dict.fromkeys(names))
    two = list(combinations(range(len(labels)), 2))
    groups = np.array([labels.index(name) for name in names])
    genomes = lowered(problem, groups, [(), *((one,) for one in range(len(labels))), *two, tuple(range(len(labels)))])
    split = evaluator.splits["search"]
    count = split.count("evaluate.sensitivity_tokens", tokens)
    windows = generator(seed, "sensitivity").choice(len(split.windows), count, replace=False).tolist()

    def of(window: int) -> npt.NDArray[np.float64]:
        return evaluator.score(genomes, split="search", windows=[window], fitness=[KL()])["kl"]

    kl = np.mean((steps or Steps()).run(windows, of, progress=progress, description=f"measuring pairs of {group}"), 0)
    rises = kl - kl[0]
    alone = rises[1 : 1 + len(labels)]
    table = np.diag(alone)
    for (one, other), rise in zip(two, rises[1 + len(labels) : -1], strict=True):
        table[one, other] = table[other, one] = rise - alone[one] - alone[other]
    rows = [
        {**{f"{PAIRS[group]}/{label}": float(value) for label, value in zip(labels, row, strict=True)}} for row in table
    ]
    whole = {f"{PAIRS[group]}/{ALL}": float(rises[-1])}
    return {unit.name: {**rows[index], **whole} for unit, index in zip(problem.units, groups, strict=True)}


def lowered(problem: Problem, groups: npt.NDArray[np.int64], sets: list[tuple[int, ...]]) -> npt.NDArray[np.int64]:
    """Return genomes with some groups at the uniform allocation and all others at their best, shape (sets, units).

    Args:
        problem: Units, ladders, budget.
        groups: Index of every unit's group, shape (units,).
        sets: Which groups each genome lowers.
    """
    uniform = problem.uniform()
    best = problem.sizes - 1
    return np.stack([np.where(np.isin(groups, chosen), uniform, best) for chosen in sets])


def pair_tokens(problem: Problem, tokens: int, *, group: str) -> int:
    """Return the tokens that ``pairs`` scores.

    Args:
        problem: Units.
        tokens: For each candidate.
        group: What a group is.
    """
    groups = len(set(group_labels(problem, group)))
    return (2 + groups + groups * (groups - 1) // 2) * tokens
