"""A search of many generations: what grows with them. A real run of the command line, watched from outside.

    python benchmarks/soak.py [--generations 2000] [--offspring 4] [--most-growth 0.02] [-- setting=value ...]

The tiny model, with MLflow in mlflow.db, the study in a journal, pictures, the search's state and, on a terminal of its
own, the progress display. Memory is the process's resident set, read as each generation is written; the first tenth of
the generations is left out, since caches fill there.
"""

import argparse
import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
WORDS = ["the", "layer", "that", "matters", "most", "is", "not", "always", "first"]
LOOK = 0.1  # seconds between looks at the process
SETTLED = 0.1  # share of the generations that caches may fill in
TINY = [
    "model=tiny",
    "data=text",
    "data.path=corpus.jsonl",
    "tokens.seq_len=64",
    "tokens.calibration=1024",
    "tokens.validation=512",
    "search.stages=[{survivors:2,tokens:64},{survivors:1,tokens:128}]",
    "evaluate.sensitivity_tokens=64",
    "report=none",
    "name=soak",
]


def write_corpus(folder: Path) -> None:
    """Write forty documents of random words."""
    rng = np.random.default_rng(0)
    rows = [json.dumps({"text": " ".join(rng.choice(WORDS, 100))}) for _ in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")


def watch(process: int, state: Path) -> dict[str, float] | None:
    """Return a look at a process: generations written, resident bytes, open files and threads; None once it is over."""
    try:
        resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())
        threads = sum(1 for _ in Path(f"/proc/{process}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    return {
        "size": state.stat().st_size if state.is_file() else 0,
        "mb": resident / 1e6,
        "fds": files,
        "tasks": threads,
    }


def run(folder: Path, arguments: list[str]) -> tuple[list[dict[str, float]], int, str]:
    """Run the command line in a folder on a terminal of its own; return looks, exit code and the end of its output."""
    write_corpus(folder)
    leader, follower = pty.openpty()
    environment = {**os.environ, "EVOSWEEP_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "evosweep", *arguments], cwd=folder, env=environment, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = bytearray()
    reader = threading.Thread(target=_drain, args=(leader, process, shown), daemon=True)
    reader.start()
    looks = []
    while process.poll() is None:
        found = sorted(folder.glob("runs/soak/*/search_state.jsonl"))
        look = watch(process.pid, found[0]) if found else None
        if look is not None:
            looks.append(look)
        time.sleep(LOOK)
    reader.join(timeout=5)
    return looks, process.returncode, shown[-2000:].decode(errors="replace")


def _drain(leader: int, process: subprocess.Popen[bytes], shown: bytearray) -> None:
    while True:
        ready, _, _ = select.select([leader], [], [], 0.5)
        try:
            found = os.read(leader, 2**16) if ready else b""
        except OSError:
            return
        shown += found
        del shown[:-4000]
        if not found and process.poll() is not None:
            return


def figures(folder: Path, looks: list[dict[str, float]]) -> dict[str, Any]:
    """Return what grew over the generations of a run that is over."""
    (state,) = folder.glob("runs/soak/*/search_state.jsonl")
    ends = np.cumsum([len(line) for line in state.read_bytes().splitlines(keepends=True)])
    records = [json.loads(line) for line in state.read_text().splitlines()[1:]]
    count = len(records)
    generation = np.searchsorted(ends, [look["size"] for look in looks], side="right") - 1
    searching = [look for look, now in zip(looks, generation, strict=True) if SETTLED * count <= now < count]
    elapsed = np.array([record["elapsed"] for record in records])
    seconds = np.diff(elapsed)  # with what is written between generations
    tenth = max(len(seconds) // 10, 1)
    memory = np.array([look["mb"] for look in searching])
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {
        "generations": count - 1,
        "memory_mb_after_a_tenth": float(np.median(memory[: max(len(memory) // 20, 1)])),
        "memory_mb_at_the_end": float(np.median(memory[-max(len(memory) // 20, 1) :])),
        "memory_kb_a_generation": float(
            1000 * np.polyfit(np.linspace(SETTLED * count, count, len(memory)), memory, 1)[0]
        ),
        "files_open": [_range(part, "fds") for part in np.array_split(np.array(searching), 2)],
        "threads": [_range(part, "tasks") for part in np.array_split(np.array(searching), 2)],
        "ms_a_generation_first_tenth": float(1000 * seconds[tenth : 2 * tenth].mean()),
        "ms_a_generation_last_tenth": float(1000 * seconds[-tenth:].mean()),
        "ms_by_tenths": [round(float(1000 * part.mean()), 2) for part in np.array_split(seconds, 10)],
        "memory_mb_by_tenths": [round(float(part.mean()), 1) for part in np.array_split(memory, 10)],
        "megabytes": {path.name: round(path.stat().st_size / 1e6, 2) for path in files if path.stat().st_size > 1e6},
    }


def _range(looks: Iterable[dict[str, float]], what: str) -> list[float]:
    """Return the least and the most of something."""
    found = [look[what] for look in looks]
    return [min(found), max(found)]


def main() -> None:
    """Print one JSON object; exit 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--offspring", type=int, default=4)
    parser.add_argument("--most-growth", type=float, default=0.02)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    sizes = [f"search.generations={options.generations}", f"search.offspring={options.offspring}"]
    with tempfile.TemporaryDirectory() as temporary:
        began = time.perf_counter()
        looks, code, shown = run(Path(temporary), [*TINY, *sizes, *options.settings])
        if code:
            sys.exit(f"exit code {code}:\n{shown}")
        found = figures(Path(temporary), looks)
    found["seconds"] = round(time.perf_counter() - began, 1)
    found["memory_growth"] = found["memory_mb_at_the_end"] / found["memory_mb_after_a_tenth"] - 1
    print(json.dumps(found, indent=1))
    more_files = found["files_open"][1][1] > found["files_open"][0][1]
    sys.exit(int(found["memory_growth"] > options.most_growth or more_files))


if __name__ == "__main__":
    main()
