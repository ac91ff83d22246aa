"""Does the search converge as its theory says? Random linear fitness over n units, k of them at the upper level.

    python benchmarks/theory.py [--seeds 20]

EvoPress (arXiv 2410.14649, theorem 1): a (1+lambda) search by swaps of one upper and one lower unit finds the best k of
n after a number of generations that grows as k (n - k) / lambda, up to a logarithmic factor, while lambda is small.
Printed: the mean number of generations for each n and lambda (k = n / 4), and that times lambda / (k (n - k)): if the
growth is right, it varies no faster than a logarithm. Then how long the exact ILP takes on random harms.
"""

import argparse
import math
import statistics
import time

import numpy as np

from evosweep.allocators.base import allocate
from evosweep.allocators.harm import AROUND_TOP
from evosweep.allocators.ilp import ILP
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.search.evolution import EvoPress
from evosweep.search.mutation import Flips

ILP_UNITS, ILP_LEVELS = 210, 7


def linear_problem(units: int, upper: int) -> Problem:
    """Return units of two levels, of which the budget lets ``upper`` be at the second."""
    ladder = (Level("low", 1), Level("high", 2))
    return Problem(tuple(Unit(f"u{n}", 1, n, ladder) for n in range(units)), budget=units + upper)


def generations_needed(*, units: int, upper: int, offspring: int, seed: int, most: int = 100_000) -> int:
    """Return after how many generations the best choice of ``upper`` units is found, on random weights."""
    weights = np.random.default_rng([seed, units]).normal(size=units)
    search = EvoPress(
        linear_problem(units, upper),
        seed=seed,
        offspring=offspring,
        mutation=Flips(max_flips=1, cross=0.0),
        start_candidates=1,
    )
    best = float(np.sort(weights)[:upper].sum())
    parent = search.start()[0]
    for generation in range(1, most + 1):
        children = search.offspring(generation=generation, parents=[parent])
        parent = min([parent, *children], key=lambda genome: float(genome @ weights))
        if math.isclose(float(parent @ weights), best, rel_tol=1e-9, abs_tol=1e-9):
            return generation
    raise RuntimeError(f"not found within {most} generations")


def ilp_seconds(seed: int) -> float:
    """Return how long the exact ILP takes on a random problem in a small model's shape."""
    rng = np.random.default_rng(seed)
    units = []
    for place in range(ILP_UNITS):
        numel = int(rng.choice([110592, 331776, 884736]))
        ladder = tuple(
            Level(f"{bits}bit", numel * bits, nominal=Nominal("bits", bits)) for bits in range(2, 2 + ILP_LEVELS)
        )
        harms = {f"{AROUND_TOP}/{level.name}": float(rng.lognormal()) * 4.0**-level.nominal.number for level in ladder}
        units.append(Unit(f"blocks.{place // 7}.linear_{place % 7}", numel, place // 7, ladder, harms))
    problem = Problem(tuple(units), budget=sum(unit.levels[1].cost for unit in units))
    began = time.perf_counter()
    allocate(ILP(harm="around_top"), problem)
    return time.perf_counter() - began


def main() -> None:
    """Print a Markdown table, and how long an ILP takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    print("| n | k | lambda | generations, mean ± sd | x lambda / (k (n - k)) |\n|---|---|---|---|---|")
    for units in (16, 32, 64, 128):
        for offspring in (1, 4, 16):
            upper = units // 4
            needed = [
                generations_needed(units=units, upper=upper, offspring=offspring, seed=seed)
                for seed in range(options.seeds)
            ]
            scaled = statistics.mean(needed) * offspring / (upper * (units - upper))
            spread = f"{statistics.mean(needed):.0f} ± {statistics.stdev(needed):.0f}"
            print(f"| {units} | {upper} | {offspring} | {spread} | {scaled:.2f} |", flush=True)
    times = [ilp_seconds(seed) for seed in range(options.seeds)]
    print(f"\nILP, {ILP_UNITS} units x {ILP_LEVELS} levels: {statistics.median(times):.3f} s, most {max(times):.3f} s")


if __name__ == "__main__":
    main()
