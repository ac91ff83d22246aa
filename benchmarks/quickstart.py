"""Time, peak memory and outcome of the quickstart.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--cold]

Runs the command a user runs, in a temporary folder, once a seed. --cold uses an empty cache for everything but the
downloaded files, so that dequantizing, cleaning and the store build are in the figure. Linux: peak memory is the
children's largest resident set.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evosweep.assets.cache_folder import cache_folder
from evosweep.core.results import read_result


def run_once(seed: int, *, cold: bool) -> dict[str, object]:
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
        rows = [read_result(path) for path in sorted(Path(folder).glob("runs/quickstart/*/*/result.json"))]
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
    }


def main() -> None:
    """Print one JSON object a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        print(json.dumps(run_once(seed, cold=options.cold), indent=1))


if __name__ == "__main__":
    main()
