"""Measures the manifest columns that need the whole model: KL and perplexity of single units, spectra, curvature."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evosweep.allocators.alpha_pruning import HILL
from evosweep.allocators.harm import (
    AROUND_TOP,
    AROUND_UNIFORM,
    AUTO_QUANTIZE,
    AUTO_SCHEME,
    BROKEN,
    EMQ,
    FISHER,
    HAWQ,
    HAWQ_HUTCHINSON,
    HAWQ_TOP,
    HIGGS,
    HIGGS_DATA,
    KL_PER_ERROR,
)
from evosweep.allocators.interactions import PAIRS
from evosweep.allocators.ranking import LOSS_ALONE
from evosweep.assets.cache_folder import cache_folder, not_writable
from evosweep.assets.locks import locked
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.files import digest, sha256_file, write_json
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.curvature import hawq, hawq_tokens, hawq_v2, hawq_v2_hutchinson
from evosweep.evaluate.emq import emq, emq_tokens, sentences
from evosweep.evaluate.gradients import auto_quantize, auto_scheme, fisher
from evosweep.evaluate.group_effects import pair_tokens, pairs
from evosweep.evaluate.input_entropy import activation_entropy
from evosweep.evaluate.linearity import NOISES, higgs, higgs_data
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.spectra import hill_exponents
from evosweep.evaluate.steps import Steps
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.activations import NONE
from evosweep.search.block_groups import ENTROPY

Columns = dict[str, dict[str, float]]
"""Columns by unit name."""

FLOOR = 0.05
SHRINKAGE = 512  # tokens at which a unit's own measurement and its kind's mean weigh alike
WAIT = 3600.0  # seconds, while another process measures the same
ALONE = Steps()  # keeps nothing
METHOD = 5  # raise when the measurement changes: cached ones then are not reused


def kl_per_error(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps = ALONE
) -> Columns:
    """Return each unit's KL per unit of layer error, measured around the budget's uniform allocation.

    Every unit alone is lowered one level (raised one, where it is at the lowest); the scale is the rise of the KL
    over the rise of the layer error. Lowering gives some ten times the signal of raising. A unit whose KL moves the
    wrong way (noise) gets the scale of the lowest twentieth instead of none. Few tokens say little about one unit, and
    a solver would use every unit that looks harmless by chance; so scales are shrunk towards the geometric mean of
    their kind (``q_proj`` and so on), the more the fewer tokens there were.

    Args:
        evaluator: Scores genomes.
        problem: Its units have layer errors.
        tokens: Tokens of the search split that each unit is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
        steps: Keeps what is done.
    """
    base = problem.uniform()
    windows = _windows(evaluator, tokens, seed)
    probed = np.where(base > 0, base - 1, np.minimum(base + 1, problem.sizes - 1))
    genomes = np.repeat(base[None], len(problem.units) + 1, axis=0)
    np.fill_diagonal(genomes, probed)
    kl = _mean_kl(evaluator, genomes, windows, steps=steps, progress=progress, description="measuring sensitivities")
    return _scales(problem, base, probed, kl[:-1] - kl[-1], trust=tokens / (tokens + SHRINKAGE))


def loss_alone(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps = ALONE
) -> Columns:
    """Return the perplexity with each unit alone at its lowest level, all others at their highest.

    Args:
        evaluator: Scores genomes.
        problem: Units.
        tokens: Tokens of the search split that each unit is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
        steps: Keeps what is done.
    """
    genomes = np.repeat((problem.sizes - 1)[None], len(problem.units), axis=0)
    np.fill_diagonal(genomes, 0)
    windows = _windows(evaluator, tokens, seed)
    fitness = Perplexity()

    def of(window: int) -> npt.NDArray[np.float64]:
        losses = evaluator.token_losses(genomes, split="search", windows=[window], fitness=[fitness])[fitness.name]
        return losses.mean(axis=(1, 2), dtype=np.float64)

    means = steps.run(windows, of, progress=progress, description="measuring every unit alone at its lowest")
    scores = [fitness.reduce(float(mean)) for mean in np.mean(means, axis=0)]
    return {unit.name: {LOSS_ALONE: float(score)} for unit, score in zip(problem.units, scores, strict=True)}


def around_uniform(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps = ALONE
) -> Columns:
    """Return how much the KL rises with one unit at each of its levels, the others as in the uniform allocation.

    A rise is in nats a token, against the uniform allocation itself on the same tokens; it may be below 0.

    Args:
        evaluator: Scores genomes.
        problem: Units.
        tokens: Tokens of the search split that each candidate is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
        steps: Keeps what is done.
    """
    base = problem.uniform()
    windows = _windows(evaluator, tokens, seed)
    return _rises(AROUND_UNIFORM, base, evaluator, problem, windows=windows, progress=progress, steps=steps)


def around_top(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps = ALONE
) -> Columns:
    """Return how much the KL rises with one unit at each of its levels, all others at their highest.

    A rise is in nats a token, against all units at their highest level on the same tokens.

    Args:
        evaluator: Scores genomes.
        problem: Units.
        tokens: Tokens of the search split that each candidate is measured on.
        seed: Chooses them.
        progress: Shows how far it is.
        steps: Keeps what is done.
    """
    base = problem.sizes - 1
    windows = _windows(evaluator, tokens, seed)
    return _rises(AROUND_TOP, base, evaluator, problem, windows=windows, progress=progress, steps=steps)


def _one(problem: Problem) -> int:
    del problem
    return 1


def _longest(problem: Problem) -> int:
    return max(int(problem.sizes.max()) - 1, 1)


@dataclass(frozen=True)
class Measure:
    """A measurement, and the tokens that it scores in all, given the tokens for each candidate.

    Attributes:
        measure: Returns the columns.
        tokens: Tokens in all.
        candidates: Candidates of a unit, which share the unit's tokens, each one window at least.
        version: Raise when this measurement changes; METHOD when all do.
        says: Returns sentences about columns, which are said whether these were measured or found.
    """

    measure: Callable[..., Columns]
    tokens: Callable[[Problem, int], int]
    candidates: Callable[[Problem], int] = _one
    version: int = 0
    says: Callable[[Columns], list[str]] | None = None


def _one_level_a_unit(problem: Problem, tokens: int) -> int:
    return (len(problem.units) + 1) * tokens


def _as_one_level(problem: Problem, tokens: int) -> int:
    return len(problem.units) * tokens


def _all_levels(problem: Problem, tokens: int) -> int:
    return (problem.total_levels - len(problem.units) + 1) * tokens


def _all_noises(problem: Problem, tokens: int) -> int:
    return (sum(len(unit.layers) for unit in problem.units) * len(NOISES) + 1) * tokens


MEASURES = {
    **{name: Measure(partial(pairs, group=group), partial(pair_tokens, group=group)) for group, name in PAIRS.items()},
    KL_PER_ERROR: Measure(kl_per_error, _one_level_a_unit),
    LOSS_ALONE: Measure(loss_alone, _as_one_level),
    AROUND_UNIFORM: Measure(around_uniform, _all_levels, _longest),
    AROUND_TOP: Measure(around_top, _all_levels, _longest),
    ENTROPY: Measure(activation_entropy, lambda problem, tokens: tokens),
    HILL: Measure(hill_exponents, lambda *_: 0),
    HAWQ: Measure(hawq_v2, _as_one_level, version=1),
    HAWQ_HUTCHINSON: Measure(hawq_v2_hutchinson, _as_one_level),
    HAWQ_TOP: Measure(hawq, hawq_tokens),
    FISHER: Measure(fisher, _as_one_level),
    AUTO_QUANTIZE: Measure(auto_quantize, _as_one_level, version=1),
    AUTO_SCHEME: Measure(auto_scheme, _as_one_level),
    HIGGS: Measure(higgs, _all_noises, lambda _: len(NOISES)),
    HIGGS_DATA: Measure(higgs_data, _all_noises, lambda _: len(NOISES)),
    EMQ: Measure(emq, emq_tokens, version=1, says=sentences),
}


def measure(
    column: str, evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress
) -> tuple[Columns, int]:
    """Return columns of ``MEASURES`` by unit name, and the tokens that they cost.

    They are kept in the cache, so that a multirun measures once; their tokens count all the same. A measurement that
    was killed goes on after its last step; of several processes one measures. A column measured at every level takes as
    many tokens a unit as one measured at a single level, but one window at least.

    Args:
        column: A key of ``MEASURES``.
        evaluator: Has model, levels and text.
        problem: Units and their levels.
        tokens: Tokens of the search split for each unit.
        seed: Chooses them.
        progress: Shows how far it is.
    """
    split = evaluator.splits["search"]
    kind = MEASURES[column]
    candidates = kind.candidates(problem)
    if candidates > 1 or kind.tokens is _all_levels:
        seq_len = split.windows.shape[1]
        tokens = max(seq_len, tokens // candidates // seq_len * seq_len)
    address = [METHOD, evaluator.store.key, problem.uniform().tolist(), split.hash, tokens, seed]
    if evaluator.resources.activations != NONE:
        address.append(evaluator.resources.activations)
    if column == EMQ and evaluator.resources.mq_bench is not None:
        address.append(sha256_file(evaluator.resources.mq_bench))
    if evaluator.store.limits:
        address.append(evaluator.store.limits)
    if kind.version:
        address.append(kind.version)
    ties = [unit.name for unit in problem.units if unit.members]
    if ties:
        address.append(ties)
    cached = cache_folder("columns") / f"{column}-{digest(address)}.json"
    values = _read(cached)
    with ExitStack() as stack:
        if values is None and _locked(stack, cached, column, progress):
            values = _read(cached)  # another process may have measured it meanwhile
            steps = Steps(cached.with_suffix(".steps"))
        else:
            steps = Steps()
        if values is not None:
            progress.say(f"{column} found")
        else:
            values = kind.measure(evaluator, problem, tokens=tokens, seed=seed, progress=progress, steps=steps)
            if steps.path is not None:
                _keep(cached, values, steps, progress)
    for sentence in kind.says(values) if kind.says else []:
        progress.say(sentence)
    return values, kind.tokens(problem, tokens)


def _read(cached: Path) -> Columns | None:
    """Return cached columns; None where there are none, or they are damaged."""
    try:
        return dict(json.loads(cached.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _locked(stack: ExitStack, cached: Path, column: str, progress: Progress) -> bool:
    """Take a measurement's lock until the stack ends; return False where the cache cannot be written.

    Args:
        stack: Frees it.
        cached: File that the measurement is kept in.
        column: What is measured.
        progress: Shows which process is waited for.
    """
    hint = "or set EVOSWEEP_CACHE to another folder"
    wait = locked(
        cached, purpose=f"measuring {column}", timeout=WAIT, progress=progress, error=EvosweepError, hint=hint
    )
    try:
        stack.enter_context(wait)
    except OSError as error:
        progress.say(f"{column} will not be kept: {not_writable(cached.parent, error)}")
        return False
    return True


def _keep(cached: Path, values: Columns, steps: Steps, progress: Progress) -> None:
    """Write columns into the cache, and remove their steps; a full disk does not end the run.

    Args:
        cached: The file.
        values: The columns.
        steps: What was kept on the way.
        progress: Told what is not kept.
    """
    try:
        write_json(cached, values)
        steps.remove()
    except OSError as error:
        progress.say(f"{cached.stem} is not kept: {not_writable(cached.parent, error)}")


def _mean_kl(
    evaluator: Evaluator,
    genomes: npt.NDArray[np.int64],
    windows: list[int],
    *,
    steps: Steps,
    progress: Progress,
    description: str,
) -> npt.NDArray[np.float64]:
    """Return the mean KL of every genome, shape (genomes,).

    One window at a time is scored, so that little is lost when it is killed; windows are equally long, so their mean is
    the mean of all.

    Args:
        evaluator: Scores genomes.
        genomes: Level indices (genomes, units).
        windows: Windows of the search split.
        steps: Keeps what is done.
        progress: Shows how far it is.
        description: What it shows.
    """

    def of(window: int) -> npt.NDArray[np.float64]:
        return evaluator.score(genomes, split="search", windows=[window], fitness=[KL()])["kl"]

    kl: npt.NDArray[np.float64] = np.mean(steps.run(windows, of, progress=progress, description=description), axis=0)
    return kl


def _rises(
    column: str,
    base: Genome,
    evaluator: Evaluator,
    problem: Problem,
    *,
    windows: list[int],
    progress: Progress,
    steps: Steps,
) -> Columns:
    every = [(unit, level) for unit, size in enumerate(problem.sizes) for level in range(size)]
    probes = [(unit, level) for unit, level in every if level != base[unit]]
    genomes = np.repeat(base[None], len(probes) + 1, axis=0)
    for row, (index, level) in enumerate(probes):
        genomes[row, index] = level
    kl = _mean_kl(evaluator, genomes, windows, steps=steps, progress=progress, description="measuring every level")
    columns = {
        unit.name: {f"{column}/{unit.levels[base[index]].name}": 0.0} for index, unit in enumerate(problem.units)
    }
    for (index, level), rise in zip(probes, kl[:-1] - kl[-1], strict=True):
        unit = problem.units[index]
        columns[unit.name][f"{column}/{unit.levels[level].name}"] = float(rise) if np.isfinite(rise) else BROKEN
    return columns


def _windows(evaluator: Evaluator, tokens: int, seed: int) -> list[int]:
    split = evaluator.splits["search"]
    count = split.count("evaluate.sensitivity_tokens", tokens)
    return [int(window) for window in generator(seed, "sensitivity").choice(len(split.windows), count, replace=False)]


def _scales(problem: Problem, base: Genome, probed: Genome, kl: npt.NDArray[np.float64], *, trust: float) -> Columns:
    """Return KL differences over layer-error differences by unit name, shrunk towards the mean of their kind."""
    errors = np.array(
        [
            float(unit.levels[new].error or 0.0) - float(unit.levels[old].error or 0.0)
            for unit, old, new in zip(problem.units, base, probed, strict=True)
        ]
    )
    right = (kl * errors > 0) & np.isfinite(kl)
    scales = np.divide(kl, errors, out=np.zeros_like(kl), where=right)
    floor = float(np.quantile(scales[right], FLOOR)) if right.any() else 1.0
    logs = np.log(np.maximum(scales, floor))
    kinds = np.unique([unit.kind for unit in problem.units], return_inverse=True)[1]
    means = np.bincount(kinds, logs) / np.bincount(kinds)
    shrunk = np.exp(trust * logs + (1 - trust) * means[kinds])
    return {unit.name: {KL_PER_ERROR: float(scale)} for unit, scale in zip(problem.units, shrunk, strict=True)}
