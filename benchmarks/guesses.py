"""Held-out KL of what samplers that guess an allocation at once find, at one size, beside the first of them.

    python benchmarks/guesses.py [--samplers uniform,owl,fisher] [--tokens 256] [overrides]
    python benchmarks/guesses.py +experiment=quickstart --device cuda --dtype bfloat16 --seconds 80

Overrides are those of evosweep: +experiment=quickstart is SmolLM2 at 107 MB. Prints a line of JSON for each sampler as
soon as it is scored: KL on the validation split, its difference from the first sampler's with the standard error over
windows, the tokens that its measurements are counted as, and seconds. No sampler begins after --seconds, those that are
left are named. Measurements are cached, and go on where they were stopped.
"""

import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from benchmarks.settings import Clock, configured, names, parsed, parser_of, progress, say, with_measurements
from evosweep.cli.compose import build
from evosweep.cli.job import materials_of
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Problem
from evosweep.fitness.kl import KL
from evosweep.workbench import Workbench, open_bench

SAMPLERS = (  # those that are measured in forward passes of every level or pair last
    *("uniform", "owl", "fisher", "auto_quantize", "auto_scheme", "hawq_v2", "ilp_scaled", "higgs", "higgs_data"),
    *("hawq_v2_pareto", "hawq", "emq", "ilp", "pairs", "inter_layer"),
)


def guessed(
    config: DictConfig, bench: Workbench, problem: Problem, tokens: int
) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """Return the genome that a configured sampler guesses, and what it took.

    Args:
        config: Has the sampler.
        bench: What columns are measured on.
        problem: Units, levels, budget.
        tokens: For each unit.
    """
    began = time.perf_counter()
    problem, spent = with_measurements(config, bench, problem, tokens)
    (genome,) = build(config, "sampler")(problem=problem, seed=config.seed).genomes(generation=0, parents=[])
    facts = {"megabytes": round(problem.megabytes(problem.cost(genome)), 2), "tokens": spent}
    return genome, {**facts, "seconds": round(time.perf_counter() - began, 1)}


def by_window(bench: Workbench, genome: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the KL of a genome on every validation window, shape (windows,)."""
    windows = list(range(len(bench.splits["validation"].windows)))
    losses = bench.evaluator.token_losses(genome[None], split="validation", windows=windows, fitness=[KL()])["kl"]
    means: npt.NDArray[np.float64] = losses[0].mean(axis=1, dtype=np.float64)
    return means


def main() -> None:
    """Print a line of JSON for each sampler."""
    parser = parser_of(__doc__)
    parser.add_argument("--samplers", type=names, default=list(SAMPLERS), help="names with commas between them")
    parser.add_argument("--tokens", type=int, help="for each unit; evaluate.sensitivity_tokens if not given")
    arguments, overrides = parsed(parser)
    clock = Clock(arguments.seconds)
    try:
        config = configured(overrides)
        bench = open_bench(materials_of(config), progress=progress())
        bench.planned_problem(build(config, "budget"))  # an error of the budget comes before the store is built
        problem = bench.problem(build(config, "budget"))
    except EvosweepError as error:
        sys.exit(str(error))
    tokens = arguments.tokens or bench.resources.sensitivity_tokens
    say(device=str(bench.anatomy.device), dtype=str(bench.anatomy.dtype), store=bench.store.key, opened=clock.seconds)
    first: npt.NDArray[np.float64] | None = None
    for index, name in enumerate(arguments.samplers):
        if clock.over:
            say(left=arguments.samplers[index:], seconds=clock.seconds)
            break
        try:
            genome, facts = guessed(configured([*overrides, f"sampler={name}"]), bench, problem, tokens)
        except EvosweepError as error:
            say(sampler=name, error=str(error))
            continue
        losses = by_window(bench, genome)
        first = losses if first is None else first
        apart = losses - first
        kl = {"kl": round(float(losses.mean()), 4), "from_first": round(float(apart.mean()), 4)}
        say(sampler=name, **kl, standard_error=round(float(apart.std(ddof=1) / len(apart) ** 0.5), 4), **facts)


if __name__ == "__main__":
    main()
