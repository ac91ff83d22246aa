"""Whether one search of size and loss beats searches at single sizes of equal total tokens, by hypervolume.

    python benchmarks/two_objectives.py [--seed 0] [--megabytes 94 98 102 106 110] [--generations 3] [--list]

Runs the quickstart's model and levels in a temporary folder: a search at each size, then nsga2_evopress with as many
generations as the same tokens pay for, measurements and last choices counted. Printed: both hypervolumes (share of the
sizes and of the losses up to the worst winner's plus a tenth), on the search tokens by which winners are chosen and on
held-out text; and the best point of the front within each size beside that size's winner. --list also searches the
sizes as one list of budgets, and prints tokens and seconds over those of one search.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from evosweep.core.results import read_result
from evosweep.samplers.two_objectives import hypervolume

COMMON = [
    "data=wikipedia",
    "model=smollm2",
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


def run(folder: Path, *settings: str) -> tuple[list[dict[str, Any]], float]:
    """Return the results of one command, and its seconds."""
    before = set(folder.glob("runs/**/result.json"))
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "evosweep", *COMMON, *settings], cwd=folder, check=True, capture_output=True)
    seconds = time.monotonic() - began
    return [read_result(path) for path in sorted(set(folder.glob("runs/**/result.json")) - before)], seconds


def main() -> None:
    """Run the searches and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[94, 98, 102, 106, 110])
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    sizes = sorted(options.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = [f"seed={options.seed}"]
        plan = [*SINGLE, f"search.generations={options.generations}", *shared]
        singles = []
        seconds = []
        for size in sizes:
            (row,), took = run(folder, *plan, f"budget.megabytes={size}")
            singles.append(row)
            seconds.append(took)
            print(json.dumps({"megabytes": size, **figures(row), "seconds": round(took, 1)}), flush=True)
        if options.list:
            rows, took = run(folder, *plan, f"budget.megabytes={sizes}")
            middle = len(sizes) // 2
            for row in sorted(rows, key=lambda row: float(row["size_mb"])):
                print(json.dumps({"list": row["budget"], **figures(row)}), flush=True)
            ratio = sum(row["tokens"] for row in rows) / singles[middle]["tokens"]
            print(
                json.dumps({"tokens_over_one": round(ratio, 3), "seconds_over_one": round(took / seconds[middle], 3)})
            )
        spent = sum(row["tokens"] for row in singles)
        least, reach = share_of(singles[0], singles[-1], folder, sizes)
        settings = [*FRONT, *shared, f"budget.megabytes={sizes[-1]}", f"sampler.smallest={least:.4f}"]
        (row,), took = run(folder, *settings, f"search.tokens={int(spent - reach)}")
        compare(singles, row, spent=spent, seconds=(sum(seconds), took))


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is printed of a winner."""
    return {key: row[key] for key in ("size_mb", "search_loss", "kl", "tokens")}


def share_of(low: dict[str, Any], high: dict[str, Any], folder: Path, sizes: list[float]) -> tuple[float, int]:
    """Return the smallest size as the sampler's share of the range, and the tokens kept for the last choice.

    The least that the levels allow is two bits: 2 bits, scale and zero of a group of 64 are 2.28125 bits a weight.
    """
    del folder
    weights = (high["size_mb"] - low["size_mb"]) * 8e6 / (high["bits_per_weight"] - low["bits_per_weight"])
    fixed = high["size_mb"] - high["bits_per_weight"] * weights / 8e6
    least = fixed + 2.28125 * weights / 8e6
    return (sizes[0] - least) / (sizes[-1] - least), 24 * 2048


def compare(singles: list[dict[str, Any]], row: dict[str, Any], *, spent: int, seconds: tuple[float, float]) -> None:
    """Print hypervolumes, and the winners side by side."""
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
        found[f"{key}_at_sizes"] = [
            [
                round(one[key], 4),
                round(min((p[key] for p in front if p["size_mb"] <= one["size_mb"] + 1e-6), default=np.inf), 4),
            ]
            for one in singles
        ]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
