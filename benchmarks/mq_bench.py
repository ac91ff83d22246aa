"""A bench of scored allocations in a file, how each training-free proxy ranks them, and the formula that EMQ finds.

    python benchmarks/mq_bench.py bench.json [--tokens 256] [--proxies snip synflow] [--seeds 0 1 2] [overrides]

Overrides are those of evosweep: +experiment=quickstart is SmolLM2 at 107 MB. evaluate.mq_bench=bench.json scores
nothing and takes that bench. --proxies: only these, and one that is constant is an error. --seeds: of EMQ's search.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from evosweep.allocators.formulas import evolved
from evosweep.cli.compose import build, imply_budget
from evosweep.cli.job import materials_of, shared_progress
from evosweep.core.checks import check_choice
from evosweep.core.errors import EvosweepError
from evosweep.evaluate.emq import measured, ranking
from evosweep.evaluate.mq_bench import write_bench
from evosweep.evaluate.steps import Steps
from evosweep.workbench import open_bench


def configured(overrides: list[str]) -> DictConfig:
    """Return the configuration that overrides make."""
    with initialize_config_module("conf", version_base=None):
        config = compose("config", overrides=overrides)
    imply_budget(config, overrides)
    return config


def figures(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Return how proxies rank the bench, and EMQ's formulas; write the bench."""
    config = configured(overrides)
    progress = shared_progress()
    bench = open_bench(materials_of(config), progress=progress)
    problem = bench.problem(build(config, "budget"))
    tokens = arguments.tokens or bench.resources.sensitivity_tokens
    tables, scored = measured(
        bench.evaluator, problem, tokens=tokens, seed=config.seed, progress=progress, steps=Steps()
    )
    facts = {"store": bench.store.key, "tokens": tokens, "budget": int(problem.budget), "seed": config.seed}
    write_bench(Path(arguments.path), problem, scored, **facts)
    names = None if arguments.proxies is None else [check_choice("proxies", one, tables) for one in arguments.proxies]
    ranked, usable = ranking(tables, scored, progress, names)
    found = [evolved(usable, problem.sizes, scored, seed=seed) for seed in arguments.seeds]
    return {
        "allocations": len(scored),
        "spearman": dict(sorted(ranked.items(), key=lambda pair: -pair[1])),
        "formulas": [str(one) for one in found],
    }


def main() -> None:
    """Print figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file that the bench is written to")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--proxies", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments, overrides = parser.parse_known_args()
    try:
        print(json.dumps(figures(arguments, overrides), indent=1))
    except EvosweepError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
