"""Whether one search of size and loss beats searches at single sizes of equal total tokens, by hypervolume.

    python benchmarks/two_objectives.py [--device cuda] [--tokens 300000] [--generations 6] [--seeds 0 1] [overrides]
    python benchmarks/two_objectives.py --list [...]

One process: the model and its level store are made once (--device auto, cpu, cuda), then for every seed a search at
each size, then nsga2_evopress with as many tokens as these took together; measurements and last choices are counted for
both. Each single search ends after --generations, or before one that would pass --tokens. Overrides are those of
evosweep; the model is SmolLM2 unless they name another.

A line of JSON for each search as it ends, and for each seed both hypervolumes: the share of sizes and losses that is
dominated, up to the worst winner's loss plus a tenth, on the search tokens by which winners are chosen and on held-out
text; and the best point of the front within each size beside that size's winner. --list also searches the sizes as one
list of budgets and prints its tokens over those of one search: a number of scored tokens, so it depends on no clock.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from benchmarks.mq_bench import configured
from evosweep.budget_list import Job, run_budgets
from evosweep.cli.job import materials_of, quiet_libraries, shared_progress, task_of
from evosweep.core.budget import Budget
from evosweep.core.errors import EvosweepError
from evosweep.pipeline import check, run
from evosweep.samplers.two_objectives import hypervolume
from evosweep.task import Notes, Task
from evosweep.workbench import Workbench, open_bench

SIZES = (2.6, 2.9, 3.2, 3.6, 4.1)  # true bits a weight
COMMON = [
    "tokens.seq_len=256",
    "tokens.calibration=16384",
    "tokens.validation=4096",
    "evaluate.sensitivity_tokens=256",
    "search.offspring=24",
    "search.final=2048",
    "export=none",
    "report=none",
    "tracking=none",
    "storage=memory",
    "name=bench",
]
SINGLE = ["sampler=evopress_ilp_scaled", "search.stages=[{survivors:6,tokens:256},{survivors:1,tokens:1024}]"]
FRONT = [
    "sampler=nsga2_evopress",
    "sampler.start.harm=scaled",
    "search.stages=[{survivors:8,tokens:256},{survivors:1,tokens:1024}]",
    "search.generations=1000",
]


class Runs:
    """Searches on one workbench, each in a folder of its own.

    Args:
        bench: The model and its levels.
        folder: Where they are written.
        overrides: Of all searches.
    """

    def __init__(self, bench: Workbench, folder: Path, overrides: list[str]) -> None:
        self.bench = bench
        self.folder = folder
        self.overrides = overrides
        self.count = 0

    def task(self, *settings: str) -> Task:
        """Return the task that settings describe."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return task_of(configured([*COMMON, *settings, *self.overrides]), folder=folder)

    def job(self, *settings: str) -> Job:
        """Return a checked task as one of several."""
        task = self.task(*settings)
        return Job(task, check(task, self.bench), Notes())

    def row(self, *settings: str) -> tuple[dict[str, Any], float]:
        """Return the result of a search, and its seconds."""
        began = time.monotonic()
        job = self.job(*settings)
        return run(job.task, self.bench, job.draft, job.notes), time.monotonic() - began


def compare_seed(runs: Runs, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the searches of one seed; return what compares them.

    Args:
        runs: Runs a search.
        seed: Of all searches.
        options: Sizes, generations, tokens.
    """
    plan = [*SINGLE, f"search.generations={options.generations}", f"seed={seed}"]
    plan += [] if options.tokens is None else [f"search.tokens={options.tokens}"]
    singles = []
    seconds = []
    for size in options.sizes:
        row, took = runs.row(*plan, f"budget.bits_per_weight={size}")
        singles.append(row)
        seconds.append(took)
        say(seed=seed, bits_per_weight=size, **figures(row), seconds=round(took, 1))
    spent = sum(row["tokens"] for row in singles)
    settings = [*FRONT, f"seed={seed}", f"budget.bits_per_weight={options.sizes[-1]}"]
    settings.append(f"sampler.smallest={smallest(runs.bench, options.sizes):.4f}")
    probe = runs.task(*settings)
    points = probe.sampler(problem=runs.bench.planned_problem(probe.budget), seed=seed).population_size
    last_choice = 2048 * max(points, 2 * options.generations)  # points of the front, or elites, scored again at the end
    row, took = runs.row(*settings, f"search.tokens={max(1, int(spent - last_choice))}")
    say(seed=seed, front=len(row["front"]), generations=row.get("generations"), **figures(row), seconds=round(took, 1))
    found = compared(singles, row, spent=spent, seconds=(sum(seconds), took))
    if options.list:
        found |= listed(runs, plan, options.sizes, singles)
    return found


def listed(runs: Runs, plan: list[str], sizes: list[float], singles: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the sizes cost and reach as one list of budgets, over the one search in the middle.

    Args:
        runs: Runs a search.
        plan: Settings of a search.
        sizes: Bits a weight.
        singles: Rows of the searches alone.
    """
    jobs = [runs.job(*plan, f"budget.bits_per_weight={size}") for size in sizes]
    rows = run_budgets(jobs, runs.bench, share=Budget(bits_per_weight=1).others)
    middle = singles[len(sizes) // 2]
    return {
        "list_tokens_over_one": round(sum(row["tokens"] for row in rows) / middle["tokens"], 3),
        "list_kl": [[round(one["kl"], 4), round(row["kl"], 4)] for one, row in zip(singles, rows, strict=True)],
    }


def smallest(bench: Workbench, sizes: list[float]) -> float:
    """Return the smallest size as the sampler counts it: its share of the way from the least to the largest."""
    low = bench.planned_problem(Budget(bits_per_weight=sizes[0]))
    high = bench.planned_problem(Budget(bits_per_weight=sizes[-1]))
    return (low.budget - low.least) / max(high.budget - low.least, 1)


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is printed of a winner."""
    return {key: row[key] for key in ("size_mb", "search_loss", "kl", "tokens")}


def compared(
    singles: list[dict[str, Any]], row: dict[str, Any], *, spent: int, seconds: tuple[float, float]
) -> dict[str, Any]:
    """Return hypervolumes (of the searches at single sizes, of the front), and the winners side by side."""
    front = row["front"]
    found: dict[str, Any] = {"tokens": [spent, row["tokens"]], "seconds": [round(part, 1) for part in seconds]}
    for key in ("search_loss", "kl"):
        worst = 1.1 * max(one[key] for one in singles)
        bounds = {"least": singles[0]["size_mb"], "most": singles[-1]["size_mb"] + 1e-9, "worst": worst}
        found[f"hypervolume_{key}"] = [
            round(
                hypervolume(np.array([p["size_mb"] for p in points]), np.array([p[key] for p in points]), **bounds), 4
            )
            for points in (singles, front)
        ]
        within = [[p[key] for p in front if p["size_mb"] <= one["size_mb"] + 1e-6] for one in singles]
        found[f"{key}_at_sizes"] = [
            [round(one[key], 4), round(min(best), 4) if best else None]
            for one, best in zip(singles, within, strict=True)
        ]
    return found


def say(**facts: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(facts), flush=True)


def opened(config: DictConfig, device: str) -> Workbench:
    """Return the workbench of a configuration, its model on a device, with the store made."""
    began = time.monotonic()
    config.model.device = device
    bench = open_bench(materials_of(config), progress=shared_progress())
    units = len(bench.store.units)
    say(model=bench.loaded.name, device=str(bench.anatomy.device), units=units, seconds=round(time.monotonic() - began))
    return bench


def main() -> None:
    """Run the searches and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="true bits a weight")
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="most tokens of a search at one size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--list", action="store_true")
    options, overrides = parser.parse_known_args()
    quiet_libraries()
    options.sizes = sorted(options.sizes)
    size = f"budget.bits_per_weight={options.sizes[-1]}"
    try:
        bench = opened(configured([*COMMON, *SINGLE, size, *overrides]), options.device)
        with tempfile.TemporaryDirectory() as name:
            runs = Runs(bench, Path(name), overrides)
            volumes = []
            for seed in options.seeds:
                found = compare_seed(runs, seed, options)
                volumes.append([found["hypervolume_search_loss"], found["hypervolume_kl"]])
                say(seed=seed, **found)
            means = np.mean(volumes, axis=0).round(4).tolist()
            say(seeds=len(volumes), hypervolume_search_loss=means[0], hypervolume_kl=means[1])
    except EvosweepError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
