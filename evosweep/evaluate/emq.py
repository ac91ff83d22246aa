"""EMQ as a measurement: proxies, a bench of scored allocations, the formula that ranks it best, and what it gives."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from evosweep.allocators.formulas import Bench, Table, evolved
from evosweep.allocators.harm import EMQ
from evosweep.assets.cache_folder import cache_folder, not_writable
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.files import digest
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.mq_bench import bench_genomes, read_bench, write_bench
from evosweep.evaluate.passes import BACKWARD, layers_with_gradients
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.proxies import activation_numbers, gradient_numbers, proxy_tables, synflow_numbers, with_bits
from evosweep.evaluate.steps import Steps
from evosweep.fitness.kl import KL
from evosweep.models.device import moved

ALLOCATIONS = 200  # scored for the bench
PASSES = 32  # most backward passes for the proxies
SPEARMAN = "emq_spearman"
FORMULA = "emq_formula"
Numbers = npt.NDArray[np.float64]


def emq_tokens(problem: Problem, tokens: int) -> int:
    """Return how many tokens ``emq`` costs in all, to be counted as those of a search are.

    ALLOCATIONS allocations are scored on ``tokens`` each, and the proxies take as many for every unit.

    Args:
        problem: Its number of units counts.
        tokens: That each of the allocations is scored on, and that each unit takes.
    """
    return (ALLOCATIONS + len(problem.units)) * tokens


def emq(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return what EMQ's best formula of proxies gives every level of every unit (arXiv 2307.10554).

    Proxies are measured, ``ALLOCATIONS`` allocations around the budget's uniform one are scored, and formulas are
    evolved by their rank correlation with the KL of half of them. The formula's text, and each proxy's own correlation,
    are columns of the first unit.

    Args:
        evaluator: Has the dense model and the levels; scores allocations.
        problem: Units, levels, budget.
        tokens: For each allocation of the bench; as many a unit for the proxies, a backward pass counted as two
            forward ones.
        seed: Chooses windows and allocations, and names the search's randomness.
        progress: Told how each proxy ranks, and the formula.
        steps: Keeps what is done; None: nothing.

    Raises:
        EvosweepError: A unit is not a layer's weight, or no formula passes the screening.
    """
    tables, bench = measured(evaluator, problem, tokens=tokens, seed=seed, progress=progress, steps=steps or Steps())
    if evaluator.resources.mq_bench is None:
        _keep(problem, bench, evaluator, tokens, progress)
    ranked, usable = ranking(tables, bench, progress)
    found = evolved(usable, problem.sizes, bench, seed=seed)
    columns = _harms(problem, found.formula.table(usable))
    first = columns[problem.units[0].name]
    first.update({f"{SPEARMAN}/{name}": value for name, value in ranked.items()})
    first[f"{FORMULA}/{found}"] = found.held_out
    return columns


def sentences(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return sentences about measured columns: how each proxy ranks allocations, and the formula."""
    first = next(iter(columns.values()), {})
    ranked = {name.partition("/")[2]: value for name, value in first.items() if name.startswith(f"{SPEARMAN}/")}
    best = sorted(ranked.items(), key=lambda pair: -pair[1])
    table = ", ".join(f"{name} {value:.3f}" for name, value in best)
    formulas = [name.partition("/")[2] for name in first if name.startswith(f"{FORMULA}/")]
    return [f"Spearman's correlation of each proxy with the KL: {table}", *formulas]


def measured(
    evaluator: Evaluator,
    problem: Problem,
    *,
    tokens: int,
    seed: int,
    progress: Progress,
    steps: Steps,
    allocations: int = ALLOCATIONS,
) -> tuple[dict[str, Table], Bench]:
    """Return the proxies by name, and the bench: scored, or read from ``evaluate.mq_bench``.

    Args:
        evaluator: Scores allocations.
        problem: Units, levels, budget.
        tokens: As for ``emq``.
        seed: Chooses windows and allocations.
        progress: Shows how far it is.
        steps: Keeps what is done.
        allocations: Scored at most.
    """
    slots = layers_with_gradients(evaluator, problem)
    split = evaluator.splits["search"]
    seq_len = split.windows.shape[1]
    path = evaluator.resources.mq_bench
    given = None if path is None else read_bench(path, problem)
    genomes = np.zeros((0, len(slots)), dtype=np.int64) if given else bench_genomes(problem, allocations, seed)
    rng = generator(seed, "emq windows")
    count = min(split.count("evaluate.sensitivity_tokens", tokens), len(split.windows))
    scored = rng.choice(len(split.windows), count, replace=False).tolist() if given is None else []
    passes = max(1, min(PASSES, len(problem.units) * tokens // (BACKWARD * seq_len)))
    backward = generator(seed, "curvature").integers(len(split.windows), size=passes).tolist()

    def ids(window: int) -> torch.Tensor:
        return moved(split.windows[window][None], evaluator.anatomy.device)

    def kl(window: int) -> Numbers:
        return evaluator.score(genomes, split="search", windows=[window], fitness=[KL()])["kl"]

    work: list[tuple[Callable[[int], Numbers], int]] = [
        *((kl, window) for window in scored),
        *((lambda window: _numbers(gradient_numbers(evaluator, slots, ids(window))), window) for window in backward),
        (lambda window: _numbers(synflow_numbers(evaluator, slots, ids(window))), backward[0]),
        (lambda window: _numbers(activation_numbers(evaluator.anatomy, slots, ids(window))), backward[0]),
    ]
    found = steps.run(work, lambda item: item[0](item[1]), progress=progress, description="proxies and their bench")
    tables = proxy_tables(
        evaluator,
        problem,
        slots,
        gradients=np.mean(found[len(scored) : -2], axis=0).reshape(len(slots), -1),
        synflow=found[-2],
        activations=found[-1].reshape(len(slots), -1),
    )
    return tables, given or _finite(Bench(genomes, np.mean(found[: len(scored)], axis=0)))


def ranking(
    tables: Mapping[str, Table], bench: Bench, progress: Progress, names: Sequence[str] | None = None
) -> tuple[dict[str, float], dict[str, Table]]:
    """Return each proxy's rank correlation with the KL, and the proxies that formulas may use.

    Args:
        tables: Proxies by name.
        bench: Scored allocations.
        progress: Told which proxies are constant or infinite, and are left out.
        names: Proxies that must rank; an error of theirs is raised. None: all, and none must.

    Raises:
        EvosweepError: A named proxy is constant.
    """
    alone = with_bits(tables)
    ranked: dict[str, float] = {}
    usable = {name: table for name, table in tables.items() if name not in alone}
    for name in names or alone:
        try:
            ranked[name] = bench.correlation(name, alone[name])
            usable[name] = tables[name]
        except EvosweepError as error:
            if names is not None:
                raise
            progress.say(f"{error}; it is left out")
    return ranked, usable


def _numbers(found: torch.Tensor) -> Numbers:
    return found.flatten().cpu().numpy()


def _finite(bench: Bench) -> Bench:
    finite = np.isfinite(bench.kl)
    return Bench(bench.genomes[finite], bench.kl[finite])


def _harms(problem: Problem, table: Table) -> dict[str, dict[str, float]]:
    return {
        unit.name: {f"{EMQ}/{level.name}": float(table[row, index]) for index, level in enumerate(unit.levels)}
        for row, unit in enumerate(problem.units)
    }


def _keep(problem: Problem, bench: Bench, evaluator: Evaluator, tokens: int, progress: Progress) -> None:
    """Write a bench into the cache, and say where; a disk that cannot take it does not end the run.

    Args:
        problem: Units and levels.
        bench: Scored allocations.
        evaluator: Whose store the levels are of.
        tokens: For each allocation.
        progress: Told the path.
    """
    key = digest([problem.fingerprint, evaluator.store.key, bench.genomes.tolist(), tokens])
    path = cache_folder("mq_bench") / f"{key}.json"
    try:
        write_bench(path, problem, bench, store=evaluator.store.key, tokens=tokens, budget=int(problem.budget))
    except OSError as error:
        progress.say(f"the bench is not kept: {not_writable(path.parent, error)}")
        return
    progress.say(f"{len(bench)} scored allocations are in {path}; evaluate.mq_bench takes them again")
