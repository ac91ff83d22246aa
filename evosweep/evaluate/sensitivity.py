"""What allocators need that only the whole model can tell: one end-to-end measurement a unit."""

import json

import numpy as np
import numpy.typing as npt

from evosweep.allocators.harm import KL_PER_ERROR
from evosweep.allocators.ranking import LOSS_ALONE
from evosweep.assets.cache import cache_folder
from evosweep.core.events import Progress
from evosweep.core.files import digest, write_json
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity

FLOOR = 0.05
SHRINKAGE = 512  # tokens at which a unit's own measurement and its kind's mean weigh alike
METHOD = 4  # raise when the measurement changes: cached ones then are not reused


def measured_tokens(problem: Problem, tokens: int) -> int:
    """Return the tokens that a measurement scores, units and base together."""
    return (len(problem.units) + 1) * tokens


def kl_per_error(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress
) -> dict[str, float]:
    """Return each unit's KL per unit of layer error, measured around the budget's uniform allocation.

    Every unit alone is lowered one level (raised one, where it is at the bottom); what the KL gains by it, over what
    the layer error gains, is the scale. Lowering is what can do harm, and its signal is some ten times that of
    raising. A unit whose KL moves the wrong way (noise) gets a low scale, not none: that of the lowest twentieth.
    Few tokens say little about one unit, and a solver finds every unit that looks harmless by chance; so scales are
    drawn towards the (geometric) mean of their kind, ``q_proj`` and so on, the more the fewer tokens there were.

    Args:
        evaluator: Scores genomes.
        problem: Its units have layer errors.
        tokens: Tokens of the search split that each unit is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
    """
    base = problem.uniform()
    windows = _windows(evaluator, tokens, seed)
    probed = np.where(base > 0, base - 1, np.minimum(base + 1, problem.sizes - 1))
    genomes = np.repeat(base[None], len(problem.units) + 1, axis=0)
    np.fill_diagonal(genomes, probed)
    # One window at a time, so that there is something to show; equal windows, so that their mean is the mean.
    scores = [
        evaluator.score(genomes, split="search", windows=[window], fitness=[KL()])["kl"]
        for window in progress.track(windows, description="measuring sensitivities")
    ]
    kl = np.mean(scores, axis=0)
    return _scales(problem, base, probed, kl[:-1] - kl[-1], trust=tokens / (tokens + SHRINKAGE))


def loss_alone(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress
) -> dict[str, float]:
    """Return the perplexity with each unit alone at its lowest level, all others at their highest.

    Args:
        evaluator: Scores genomes.
        problem: Units.
        tokens: Tokens of the search split that each unit is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
    """
    genomes = np.repeat((problem.sizes - 1)[None], len(problem.units), axis=0)
    np.fill_diagonal(genomes, 0)
    windows = _windows(evaluator, tokens, seed)
    progress.say(f"measuring {len(genomes)} units, each alone at its lowest")
    fitness = Perplexity()
    scores = evaluator.score(genomes, split="search", windows=windows, fitness=[fitness])[fitness.name]
    return {unit.name: float(score) for unit, score in zip(problem.units, scores, strict=True)}


MEASURES = {KL_PER_ERROR: kl_per_error, LOSS_ALONE: loss_alone}


def measure(
    column: str, evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress
) -> dict[str, float]:
    """Return a column of ``MEASURES`` by unit name; kept in the cache, so that a multirun measures once."""
    split = evaluator.splits["search"]
    place = [METHOD, evaluator.store.key, problem.uniform().tolist(), split.hash, tokens, seed]
    cached = cache_folder("columns") / f"{column}-{digest(place)}.json"
    if cached.exists():
        progress.say(f"{column} found")
        return dict(json.loads(cached.read_text(encoding="utf-8")))
    values = MEASURES[column](evaluator, problem, tokens=tokens, seed=seed, progress=progress)
    write_json(cached, values)
    return values


def _windows(evaluator: Evaluator, tokens: int, seed: int) -> list[int]:
    split = evaluator.splits["search"]
    count = split.count("evaluate.sensitivity_tokens", tokens)
    return [int(window) for window in generator(seed, "sensitivity").choice(len(split.windows), count, replace=False)]


def _scales(
    problem: Problem, base: Genome, probed: Genome, kl: npt.NDArray[np.float64], *, trust: float
) -> dict[str, float]:
    """Return KL differences over layer-error differences by unit name, shrunk towards the mean of their kind."""
    errors = np.array(
        [
            float(unit.levels[there].error or 0.0) - float(unit.levels[here].error or 0.0)
            for unit, here, there in zip(problem.units, base, probed, strict=True)
        ]
    )
    right = (kl * errors > 0) & np.isfinite(kl)
    scales = np.divide(kl, errors, out=np.zeros_like(kl), where=right)
    floor = float(np.quantile(scales[right], FLOOR)) if right.any() else 1.0
    logs = np.log(np.maximum(scales, floor))
    kinds = np.unique([unit.kind for unit in problem.units], return_inverse=True)[1]
    means = np.bincount(kinds, logs) / np.bincount(kinds)
    shrunk = np.exp(trust * logs + (1 - trust) * means[kinds])
    return {unit.name: float(scale) for unit, scale in zip(problem.units, shrunk, strict=True)}
