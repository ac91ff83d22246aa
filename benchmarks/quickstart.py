"""Time, peak memory and outcome of the quickstart, and whether its winner is really better.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--cold] [--code]

Runs the command a user runs, in a temporary folder, once a seed. --cold uses an empty cache for everything but the
downloaded files, so that dequantizing, cleaning and the store build are in the figure. Linux: peak memory is the
children's largest resident set. The last sampler is compared with every other by a paired t test over windows of
held-out text; with --code over windows of the Python standard library's sources, too, which no search has seen.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from evosweep.assets.cache_folder import cache_folder
from evosweep.core.results import read_result
from evosweep.tracking.significance import paired

WINDOWS = {"tokens.seq_len": 256, "tokens.validation": 16384}  # of code


def on_code(runs: list[Path], folder: Path, environment: dict[str, str]) -> dict[str, list[float]]:
    """Return run -> KL of every window of the Python standard library's sources."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = folder / "code.jsonl"
    text.write_text(
        "".join(json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in sources), encoding="utf-8"
    )
    settings = ["data=text", f"data.path={text}", *(f"{name}={value}" for name, value in WINDOWS.items())]
    found = {}
    for run in runs:
        command = [sys.executable, "-m", "evosweep", "score", str(run), *settings]
        done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        found[str(run)] = json.loads(done.stdout.splitlines()[-1])["kl_by_window"]
    return found


def compared(names: list[str], windows: list[list[float]]) -> list[str]:
    """Return what a paired test says of the last sampler against every other, one sentence each."""
    return [
        paired(windows[-1], other).sentence(name=names[-1], than=name)
        for name, other in zip(names[:-1], windows[:-1], strict=True)
    ]


def run_once(seed: int, *, cold: bool, code: bool) -> dict[str, object]:
    """Return figures of one quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if cold:
            cache = Path(folder) / "cache"
            shutil.copytree(cache_folder("assets"), cache / "assets")
            environment["EVOSWEEP_CACHE"] = str(cache)
        began = time.monotonic()
        command = [sys.executable, "-m", "evosweep", "+experiment=quickstart", f"seed={seed}"]
        subprocess.run(command, cwd=folder, env=environment, check=True)
        seconds = time.monotonic() - began
        paths = sorted(Path(folder).glob("runs/quickstart/*/*/result.json"))
        rows = [read_result(path) for path in paths]
        names = [row["sampler"] for row in rows]
        facts: dict[str, object] = {"held_out": compared(names, [row["kl_by_window"] for row in rows])}
        if code:
            scored = on_code([path.parent for path in paths], Path(folder), environment)
            facts["code_kl"] = {n: round(sum(w) / len(w), 4) for n, w in zip(names, scored.values(), strict=True)}
            facts["code"] = compared(names, list(scored.values()))
    return {
        "seed": seed,
        "cold": cold,
        "seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
        "phases": {key: value for row in rows for key, value in row["phases"].items()},
        "search_seconds": {row["sampler"]: round(row["seconds"], 1) for row in rows},
        "dense_ppl": round(rows[0]["dense_ppl"], 2),
        "ppl": {row["sampler"]: round(row["ppl"], 2) for row in rows},
        "kl": {row["sampler"]: round(row["kl"], 4) for row in rows},
        "bits_per_weight": {row["sampler"]: round(row["bits_per_weight"], 4) for row in rows},
        **facts,
    }


def main() -> None:
    """Print one JSON object a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--code", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        print(json.dumps(run_once(seed, cold=options.cold, code=options.code), indent=1))


if __name__ == "__main__":
    main()
