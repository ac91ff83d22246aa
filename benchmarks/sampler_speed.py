"""How long a trial of ``study.optimize`` takes with EvoPressSampler, early and late in a study.

    python benchmarks/sampler_speed.py [--trials 500 5000] [--units 210] [--levels 7]
    python benchmarks/sampler_speed.py --measured [--units 1000] [--levels 12]
    python benchmarks/sampler_speed.py --front [--units 1000] [--levels 12]

Printed: CPU milliseconds a trial (other processes do not change them much) over the 100 trials before each of the given
numbers, with storage in memory and an objective that costs nothing; for comparison the same with a sampler of Optuna
that looks at no history. And the time in which a generation is proposed in our own loop. --measured: only that, of the
samplers that have single moves measured, after a survey of made-up losses. --front: of the search of two objectives,
with the fit of its model of losses; from uniform sizes, and from the ILP's at 64 sizes, which are worked out before.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import optuna

from evosweep.allocators.ilp import ILP
from evosweep.core.events import Candidate
from evosweep.core.problem import Genome, Problem
from evosweep.core.unit import Level, Unit
from evosweep.samplers.base import suggest_allocation, unit_distributions
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.trust_region import TrustRegionSampler
from evosweep.samplers.two_objectives import TwoObjectivesSampler
from evosweep.search.protocols import Text

LAST = 100


def made_up_problem(units: int, levels: int) -> Problem:
    """Return units of three sizes, seven to a block, at what one of the lower levels costs everywhere."""
    sizes = (110_592, 331_776, 884_736)
    made = []
    for n in range(units):
        numel = sizes[n % 3]
        ladder = tuple(Level(f"{bits}bit", numel * bits) for bits in range(2, 2 + levels))
        made.append(Unit(f"blocks.{n // 7}.linear_{n % 7}", numel, n // 7, ladder))
    return Problem(tuple(made), budget=sum(unit.levels[1].cost for unit in made))


def milliseconds(study: optuna.Study, problem: Problem, until: int) -> float:
    """Run a study up to a number of trials; return the time of each of the last ``LAST``."""
    weights = np.random.default_rng(0).normal(size=len(problem.units))

    def objective(trial: optuna.Trial) -> float:
        return float(problem.encode(suggest_allocation(trial, problem)) @ weights)

    study.optimize(objective, n_trials=max(0, until - LAST - len(study.trials)))
    began = time.process_time()
    study.optimize(objective, n_trials=LAST)
    return 1000 * (time.process_time() - began) / LAST


def generation_milliseconds(problem: Problem, offspring: int, repeats: int = 20) -> float:
    """Return the median time in which a generation is proposed in our own loop."""
    sampler = EvoPressSampler(problem, seed=0, offspring=offspring)
    parent = problem.uniform()
    times = []
    for generation in range(1, repeats + 1):
        began = time.process_time()
        parent = sampler.genomes(generation=generation, parents=[parent])[0]
        times.append(time.process_time() - began)
    return 1000 * float(np.median(times))


def measured_milliseconds(problem: Problem, sampler: EvoPressSampler, repeats: int = 9) -> float:
    """Return the median time in which a generation is proposed after a survey."""
    parents = [problem.uniform()]
    rng = np.random.default_rng(0)
    times = []
    for _ in range(repeats):
        survey = sampler.survey(generation=1, parents=parents, text=Text(windows=64, seq_len=2048))
        while survey is not None and (request := survey.ask()) is not None:
            windows = request.windows.stop - request.windows.start
            survey.tell(rng.normal(size=(len(request.genomes), windows, 64)).astype(np.float32))
        began = time.process_time()
        sampler.genomes(generation=1, parents=parents)
        times.append(time.process_time() - began)
    return 1000 * float(np.median(times))


def front_milliseconds(problem: Problem, sampler: TwoObjectivesSampler, generations: int = 16) -> dict[str, float]:
    """Return the times of the start, of proposals (median of later generations), and with learning and ordering."""
    weights = np.random.default_rng(0).gamma(1.0, size=len(problem.units)) * problem.numels / problem.numels.mean()
    parents: list[Genome] = []
    times = []
    proposing = []
    for generation in range(generations):
        began = time.process_time()
        candidates = sampler.population(generation=generation, parents=parents)
        spent = time.process_time() - began
        proposing.append(1000 * spent)
        scores = [float(weights @ 4.0 ** -(2 + c.genome)) for c in candidates]
        genomes = [c.genome for c in candidates] + parents
        scores += [float(weights @ 4.0 ** -(2 + genome)) for genome in parents]
        scored = [
            Candidate(slot=c.slot, genome=c.genome, scores={1: s}) for c, s in zip(candidates, scores, strict=False)
        ]
        began = time.process_time()
        sampler.learn(scored)
        order = sampler.order(genomes, np.array(scores))
        times.append(1000 * (spent + time.process_time() - began))
        parents = [genomes[index] for index in order[: sampler.population_size]]
    proposals = float(np.median(proposing[3:]))
    return {"start": times[0], "proposals": proposals, "all": float(np.median(times[3:])), "longest": max(times[1:])}


def with_errors(problem: Problem) -> Problem:
    """Return the problem with the errors that an allocator reads."""
    rng = np.random.default_rng(1)
    units = []
    for unit in problem.units:
        scale = float(rng.gamma(1.0))
        levels = [replace(level, error=scale * 4.0 ** -(2 + n)) for n, level in enumerate(unit.levels)]
        units.append(replace(unit, levels=tuple(levels)))
    return replace(problem, units=tuple(units))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--units", type=int, default=210)
    parser.add_argument("--levels", type=int, default=7)
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--front", action="store_true")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    problem = made_up_problem(options.units, options.levels)
    if options.measured:
        informed = EvoPressSampler(problem, offspring=64, proposals="informed")
        for sampler in (TrustRegionSampler(problem), informed):
            name = f"{sampler.name}, {sampler.size(1)} proposals"
            print(f"{name}: {measured_milliseconds(problem, sampler):.1f} CPU ms", flush=True)
        return
    if options.front:
        wide = with_errors(problem).within(sum(unit.levels[len(unit.levels) // 2].cost for unit in problem.units))
        for start in (None, ILP(harm="bare")):
            times = front_milliseconds(wide, TwoObjectivesSampler(wide, offspring=64, start=start))
            told = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
            print(f"nsga2_evopress from {'uniform' if start is None else 'ILP'}, CPU ms: {told}", flush=True)
        return
    assert len(unit_distributions(problem)) == options.units
    print(f"128 offspring proposed at once: {generation_milliseconds(problem, 128):.1f} CPU ms\n", flush=True)
    print("| sampler | " + " | ".join(f"CPU ms a trial at {n}" for n in options.trials) + " |")
    print("|---|" + "---|" * len(options.trials))
    samplers = {"evopress": EvoPressSampler(problem, seed=0), "optuna random": optuna.samplers.RandomSampler(seed=0)}
    for name, sampler in samplers.items():
        study = optuna.create_study(sampler=sampler)
        times = [milliseconds(study, problem, until) for until in options.trials]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in times) + " |", flush=True)


if __name__ == "__main__":
    main()
