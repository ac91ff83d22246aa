"""Which levels are worth what: stacks of levels, uniform and searched, at three sizes, over calibration seeds.

    python benchmarks/levels.py --stacks plain order grid --seeds 1 2 3 --folder levels-here [--jobs 4]
    python benchmarks/levels.py --read levels-here

For a GPU. It runs ``+experiment=levels`` once for each stack and seed, several at a time, since one small model does
not fill a card, and prints a table of held-out KL and PPL, mean and standard deviation over the calibration seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evosweep.core.results import read_result

QUIET = ("tracking=none", "export=none", "report=none", "storage=memory")
Row = dict[str, object]


def run(stack: str, seed: int, *, folder: Path, overrides: Sequence[str]) -> str:
    """Run one stack with one calibration seed; return one line on how it went."""
    began = time.monotonic()
    target = folder / f"{stack}-{seed}"
    command = [sys.executable, "-m", "evosweep", "+experiment=levels", f"levels={stack}", f"tokens.seed={seed}"]
    target.mkdir(parents=True, exist_ok=True)
    with (target / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [*command, *QUIET, f"hydra.sweep.dir={target}", *overrides], stdout=log, stderr=log, check=False
        )
    text = (target / "log.txt").read_text(encoding="utf-8").splitlines() or [""]
    return f"{stack} {seed}: exit {done.returncode} after {time.monotonic() - began:.0f} s; {text[-1][:200]}"


def rows(folder: Path) -> Iterator[Row]:
    """Yield a short row for every result below a folder."""
    for path in sorted(folder.rglob("result.json")):
        found = read_result(path)
        stack, _, seed = path.relative_to(folder).parts[0].rpartition("-")
        yield {
            "stack": stack,
            "seed": int(seed),
            "size": float(str(found["budget"]).partition("=")[2]),
            **{name: found[name] for name in ("sampler", "bits_per_weight", "size_mb", "kl", "ppl", "dense_ppl")},
            "tokens": found.get("tokens"),
            "store_seconds": found.get("phases", {}).get("store"),
        }


def table(found: Sequence[Row]) -> str:
    """Return a Markdown table: a line a stack and sampler, a column a size."""
    cells: dict[tuple[str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        cells[str(row["stack"]), str(row["sampler"])][float(str(row["size"]))].append(row)
    sizes = sorted({float(str(row["size"])) for row in found})
    lines = ["| levels | sampler | " + " | ".join(f"{size} bits: KL / PPL" for size in sizes) + " |"]
    lines.append("|---|---|" + "---|" * len(sizes))
    for (stack, sampler), by_size in cells.items():
        lines.append(f"| {stack} | {sampler} | " + " | ".join(_cell(by_size[size]) for size in sizes) + " |")
    return "\n".join(lines)


def _cell(found: Sequence[Row]) -> str:
    if not found:
        return ""
    kl = [float(str(row["kl"])) for row in found]
    ppl = [float(str(row["ppl"])) for row in found]
    spread = f" ± {statistics.stdev(kl):.3f}" if len(kl) > 1 else ""
    bits = statistics.mean(float(str(row["bits_per_weight"])) for row in found)
    return f"{statistics.mean(kl):.3f}{spread} / {statistics.mean(ppl):.1f} ({bits:.2f})"


def main() -> None:
    """Run what is asked, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", default=["plain"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, default=Path("levels"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--read", action="store_true", help="only read what is there")
    parser.add_argument("overrides", nargs="*", help="further settings, as model=gemma3_270m")
    options = parser.parse_args()
    if not options.read:
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [(stack, seed) for seed in options.seeds for stack in options.stacks]
            for line in pool.map(
                lambda job: run(*job, folder=options.folder.absolute(), overrides=options.overrides), jobs
            ):
                print(line, flush=True)
    found = list(rows(options.folder))
    (options.folder / "rows.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
