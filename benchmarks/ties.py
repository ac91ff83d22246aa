"""What ties cost: the same levels, budget and search, with every layer by itself and with fused layers tied.

    python benchmarks/ties.py --megabytes 107 --samplers uniform ilp_scaled evopress_ilp_scaled --folder here
    python benchmarks/ties.py --read --folder here

Runs on two CPU cores: the quickstart's model, text and settings. A level store is built once for all; held-out KL and
PPL come from validation tokens, which no search sees.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from evosweep.core.results import read_result

QUIET = ("tracking=none", "export=none", "report=none", "storage=memory")
TIES = ("none", "fused")
Row = dict[str, float | str]


def run(tie: str, options: argparse.Namespace) -> str:
    """Run every sampler, size and seed with one tie; return one line on how it went."""
    began = time.monotonic()
    target = options.folder.absolute() / tie
    target.mkdir(parents=True, exist_ok=True)
    settings = [
        f"units.tie={tie}",
        f"sampler={','.join(options.samplers)}",
        f"budget.megabytes={','.join(map(str, options.megabytes))}",
        f"seed={','.join(map(str, options.seeds))}",
        f"hydra.sweep.dir={target}/{int(time.time())}",
    ]
    command = [sys.executable, "-m", "evosweep", "-m", "+experiment=quickstart", *QUIET, *settings, *options.overrides]
    with (target / "log.txt").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    return f"{tie}: exit {done.returncode} after {time.monotonic() - began:.0f} s"


def rows(folder: Path) -> list[Row]:
    """Return a short row for every result below a folder."""
    names = ("sampler", "budget", "seed", "kl", "ppl", "bits_per_weight", "size_mb", "search_loss", "tokens")
    return [
        {"tie": tie, **{name: found.get(name) for name in names}}
        for tie in TIES
        for found in map(read_result, sorted((folder / tie).rglob("result.json")))
    ]


def table(found: Sequence[Row]) -> str:
    """Return a Markdown table: a line a size and sampler, with and without ties, and what the tie costs."""
    cells: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        cells[str(row["budget"]), str(row["sampler"])][str(row["tie"])].append(row)
    lines = [
        "| size | sampler | seeds | KL / PPL, a level a layer | KL / PPL, tied | KL, tied over untied |",
        "|---" * 6 + "|",
    ]
    for (size, sampler), by_tie in sorted(cells.items()):
        if set(by_tie) < set(TIES):
            continue
        kl = {tie: statistics.mean(float(row["kl"]) for row in by_tie[tie]) for tie in TIES}
        figures = " | ".join(_figures(by_tie[tie]) for tie in TIES)
        seeds = len({row["seed"] for row in by_tie["none"]})
        lines.append(f"| {size} | {sampler} | {seeds} | {figures} | {kl['fused'] / kl['none'] - 1:+.1%} |")
    return "\n".join(lines)


def _figures(found: Sequence[Row]) -> str:
    kl = [float(row["kl"]) for row in found]
    spread = f" ± {statistics.stdev(kl):.4f}" if len(kl) > 1 else ""
    ppl = statistics.mean(float(row["ppl"]) for row in found)
    return f"{statistics.mean(kl):.4f}{spread} / {ppl:.2f}"


def main() -> None:
    """Run what is asked, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[107.0])
    parser.add_argument("--samplers", nargs="+", default=["uniform", "ilp_scaled", "evopress_ilp_scaled"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ties", nargs="+", choices=TIES, default=TIES)
    parser.add_argument("--folder", type=Path, default=Path("ties"))
    parser.add_argument("--read", action="store_true", help="only read what is there")
    parser.add_argument("overrides", nargs="*", help="further settings, as model=gemma3_270m")
    options = parser.parse_args()
    for tie in () if options.read else options.ties:
        print(run(tie, options), flush=True)
    found = rows(options.folder)
    (options.folder / "rows.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
