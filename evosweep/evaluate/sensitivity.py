"""How much each unit's layer error matters end to end: one KL measurement a unit."""

import json

import numpy as np

from evosweep.assets.cache import cache_folder
from evosweep.core.events import Progress
from evosweep.core.files import digest, write_json
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL


def measured_tokens(problem: Problem, tokens: int) -> int:
    """Return the tokens that ``kl_per_error`` scores, units and base together."""
    return (len(problem.units) + 1) * tokens


def kl_per_error(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress
) -> dict[str, float]:
    """Return each unit's KL per unit of layer error, measured around the budget's uniform allocation.

    Every unit alone is raised to the top of its ladder; what the KL loses by it, over what the layer error loses, is
    the scale. A unit whose KL does not fall (noise) gets the smallest positive scale of all. Kept in the cache beside
    the store, so that a multirun measures once.

    Args:
        evaluator: Scores genomes.
        problem: Its units have layer errors.
        tokens: Tokens of the search split that each unit is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
    """
    split = evaluator.splits["search"]
    count = split.count("evaluate.sensitivity_tokens", tokens)
    base = problem.uniform()
    address = digest([evaluator.store.key, base.tolist(), split.hash, tokens, seed])
    cached = cache_folder("columns") / f"kl_per_error-{address}.json"
    if cached.exists():
        progress.say("sensitivities found")
        return dict(json.loads(cached.read_text(encoding="utf-8")))
    windows = generator(seed, "sensitivity").choice(len(split.windows), size=count, replace=False).tolist()
    raised = np.repeat(base[None], len(problem.units) + 1, axis=0)
    raised[np.arange(len(problem.units)), np.arange(len(problem.units))] = problem.sizes - 1
    # One window at a time, so that there is something to show; equal windows, so that their mean is the mean.
    scores = [
        evaluator.score(raised, split="search", windows=[window], fitness=[KL()])["kl"]
        for window in progress.track(windows, description="measuring sensitivities")
    ]
    kl = np.mean(scores, axis=0)
    scales = _scales(problem, base.tolist(), kl[-1] - kl[:-1])
    write_json(cached, scales)
    return scales


def _scales(problem: Problem, base: list[int], gains: np.ndarray) -> dict[str, float]:
    lost = np.array(
        [
            float(unit.levels[level].error or 0.0) - float(unit.levels[-1].error or 0.0)
            for unit, level in zip(problem.units, base, strict=True)
        ]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where((gains > 0) & (lost > 0), gains / lost, np.nan)
    floor = float(np.nanmin(scales)) if np.isfinite(scales).any() else 1.0
    return {
        unit.name: float(scale) for unit, scale in zip(problem.units, np.nan_to_num(scales, nan=floor), strict=True)
    }
