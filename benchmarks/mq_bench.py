"""A bench of scored allocations in a file, how each training-free proxy ranks them, and the formula that EMQ finds.

    python benchmarks/mq_bench.py bench.json [--tokens 256] [--proxies snip,synflow] [--seeds 0,1,2] [overrides]
    python benchmarks/mq_bench.py bench.json +experiment=quickstart --device cuda --dtype bfloat16

Overrides are those of evosweep: +experiment=quickstart is SmolLM2 at 107 MB. evaluate.mq_bench=bench.json scores
nothing and takes that bench. --proxies: only these, and one that is constant is an error. --seeds: of EMQ's search.
Prints a line of JSON for the bench, one for each proxy, the best first, and one for each seed's formula.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.settings import Clock, configured, names, numbers, parsed, parser_of, progress, say
from evosweep.allocators.formulas import evolved
from evosweep.cli.compose import build
from evosweep.cli.job import materials_of
from evosweep.core.checks import check_choice
from evosweep.core.errors import EvosweepError
from evosweep.evaluate.emq import ALLOCATIONS, measured, ranking
from evosweep.evaluate.mq_bench import write_bench
from evosweep.evaluate.steps import Steps
from evosweep.workbench import open_bench


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Write the bench; print how each proxy ranks it, and EMQ's formulas."""
    clock = Clock(arguments.seconds)
    config = configured(overrides)
    bench = open_bench(materials_of(config), progress=progress())
    bench.planned_problem(build(config, "budget"))  # an error of the budget comes before the store is built
    problem = bench.problem(build(config, "budget"))
    tokens = arguments.tokens or bench.resources.sensitivity_tokens
    tables, scored = measured(
        bench.evaluator,
        problem,
        tokens=tokens,
        seed=config.seed,
        progress=bench.progress,
        steps=Steps(),
        allocations=arguments.allocations,
    )
    facts = {"store": bench.store.key, "tokens": tokens, "budget": int(problem.budget), "seed": config.seed}
    write_bench(arguments.path, problem, scored, **facts)
    span = [round(float(bound), 4) for bound in (scored.kl.min(), scored.kl.max())]
    say(device=str(bench.anatomy.device), allocations=len(scored), kl=span, seconds=clock.seconds, **facts)
    chosen = None if arguments.proxies is None else [check_choice("proxies", one, tables) for one in arguments.proxies]
    ranked, usable = ranking(tables, scored, bench.progress, chosen)
    for name, value in sorted(ranked.items(), key=lambda pair: -pair[1]):
        say(proxy=name, spearman=round(value, 4))
    for seed in arguments.seeds:
        if clock.over:
            break
        found = evolved(usable, problem.sizes, scored, seed=seed)
        figures = {"fitted": round(found.fitted, 4), "held_out": round(found.held_out, 4), "tried": found.tried}
        say(seed=seed, formula=str(found.formula), **figures, seconds=clock.seconds)


def main() -> None:
    """Print lines of JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("path", type=Path, help="file that the bench is written to")
    parser.add_argument("--tokens", type=int, help="for each allocation; evaluate.sensitivity_tokens if not given")
    parser.add_argument("--allocations", type=int, default=ALLOCATIONS)
    parser.add_argument("--proxies", type=names, help="names with commas between them")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="numbers with commas between them")
    arguments, overrides = parsed(parser)
    try:
        run(arguments, overrides)
    except EvosweepError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
