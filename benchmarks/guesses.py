"""Held-out KL of what samplers that guess an allocation at once find, at one size, scored together.

    python benchmarks/guesses.py [--samplers uniform owl ilp_scaled fisher ...] [--tokens 256] [overrides]

Overrides are those of evosweep: +experiment=quickstart is SmolLM2 at 107 MB. Prints a line of JSON for each sampler:
KL on the validation split, its difference from the first sampler's with the standard error over windows, and the tokens
that its measurements are counted as. Measurements are cached, and go on where they were stopped.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from benchmarks.mq_bench import configured
from evosweep.cli.compose import build
from evosweep.cli.job import materials_of, shared_progress
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Problem
from evosweep.evaluate.sensitivity import MEASURES, measure
from evosweep.fitness.kl import KL
from evosweep.workbench import Workbench, open_bench

SAMPLERS = (
    *("uniform", "owl", "ilp_scaled", "fisher", "auto_quantize", "auto_scheme"),
    *("higgs", "higgs_data", "hawq", "hawq_v2", "hawq_v2_pareto", "emq"),
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
    make = build(config, "sampler")
    spent = 0
    for name in make(problem=problem, seed=config.seed).columns:
        if name not in MEASURES:
            continue
        found, cost = measure(name, bench.evaluator, problem, tokens=tokens, seed=config.seed, progress=bench.progress)
        spent += cost
        units = [replace(unit, columns={**unit.columns, **found.get(unit.name, {})}) for unit in problem.units]
        problem = replace(problem, units=tuple(units))
    (genome,) = make(problem=problem, seed=config.seed).genomes(generation=0, parents=[])
    facts = {"megabytes": round(problem.megabytes(problem.cost(genome)), 2), "tokens": spent}
    return genome, {**facts, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Print a line of JSON for each sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--tokens", type=int, help="for each unit; evaluate.sensitivity_tokens if not given")
    arguments, overrides = parser.parse_known_args()
    try:
        config = configured(overrides)
        bench = open_bench(materials_of(config), progress=shared_progress())
        problem = bench.problem(build(config, "budget"))
        tokens = arguments.tokens or bench.resources.sensitivity_tokens
        found = {
            name: guessed(configured([*overrides, f"sampler={name}"]), bench, problem, tokens)
            for name in arguments.samplers
        }
        windows = list(range(len(bench.splits["validation"].windows)))
        genomes = np.stack([genome for genome, _ in found.values()])
        losses = bench.evaluator.token_losses(genomes, split="validation", windows=windows, fitness=[KL()])["kl"]
    except EvosweepError as error:
        sys.exit(str(error))
    by_window = losses.mean(axis=2, dtype=np.float64)
    for row, (name, (_, facts)) in enumerate(found.items()):
        apart = by_window[row] - by_window[0]
        error = float(apart.std(ddof=1) / len(apart) ** 0.5)
        kl = {"kl": round(float(by_window[row].mean()), 4), "from_first": round(float(apart.mean()), 4)}
        print(json.dumps({"sampler": name, **kl, "standard_error": round(error, 4), **facts}))


if __name__ == "__main__":
    main()
