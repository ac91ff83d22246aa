"""Kills runs at random moments and lets ``resume=auto`` go on: how many find what an undisturbed run finds.

    python benchmarks/kills.py [--times 20] [--first 1] [--seed 0] [--folder ...]

A model of six small blocks on the CPU. The kills (SIGKILL) are spread evenly over the phases of a run: building the
level store, measuring the whole model, searching, exporting. A kill comes a random time after the first file of its
phase, of as long as the phase took in an undisturbed run. Compared are allocation, figures, every candidate of every
generation, the trials of the Optuna study, the steps of every MLflow metric, and the exported tensors; a generation
that was done before the kill must keep its own seconds, or else it was scored twice.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cli import TINY, write_corpus
from tests.faults.forked import fork
from tests.faults.processes import PATIENCE, lines, logged, only_run, outcome, trials

RUN = [
    *TINY,
    "model.config.num_hidden_layers=6",
    "search.generations=12",
    "sampler=evopress_ilp_scaled",
    "search.final=true",
    "evaluate.sensitivity_tokens=512",
    "report=none",
]
WHOLE = "whole"
PHASES = ("store", "measurement", "search", "export")
ATTEMPTS = 5  # with half the wait each, where a run was over before its kill


@dataclass(frozen=True)
class Attempt:
    """A run that is to be killed: where it works, what it is called, and where its cache is."""

    folder: Path
    name: str

    @property
    def cache(self) -> Path:
        """Its own, so that it builds and measures everything."""
        return self.folder / f"cache_{self.name}"

    def files(self, pattern: str) -> list[Path]:
        """Return files of the run."""
        return list(self.folder.glob(f"runs/{self.name}/*/{pattern}"))

    def reached(self, phase: str) -> bool:
        """Return whether a phase has written its first file."""
        return bool(
            {
                "store": lambda: list(self.cache.glob("stores/*.partial/settings.json")),
                "measurement": lambda: list(self.cache.glob("columns/*.steps")),
                "search": lambda: self.files("search_state.jsonl"),
                "export": lambda: self.files(".model.partial"),
            }[phase]()
        )

    def progress(self) -> str:
        """Return what is there: finished blocks, steps, generations, the export."""
        if self.files("model"):
            return "exported"
        if self.files(".model.partial"):
            return "exporting"
        state = self.files("search_state.jsonl")
        if state:
            return f"{max(0, lines(state[0]) - 1)} generations"
        steps = list(self.cache.glob("columns/*.steps"))
        if steps:
            return f"{lines(steps[0])} steps"
        return f"{len(list(self.cache.glob('stores/*.partial/[0-9]*.json')))} blocks"


def main() -> None:
    """Print a table of all kills, and how many went on to the same result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="number of the first kill, where earlier ones were done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if run(folder, first=options.first, times=options.times, seed=options.seed) else 1)


def run(folder: Path, *, first: int, times: int, seed: int) -> bool:
    """Kill and resume; return whether all went on to the same result.

    Args:
        folder: Where the runs work.
        first: Number of the first kill.
        times: Number of the last.
        seed: Chooses their moments.
    """
    whole = Attempt(folder, WHOLE)
    if not whole.files("result.json"):
        write_corpus(folder)
        _finish(whole)
    seconds = _seconds(whole)
    rng = np.random.default_rng(seed)
    table = Table("", "phase", "killed after", "there then", "same", "differs in", box=box.SIMPLE)
    same = 0
    for number in range(times):
        phase = PHASES[number % len(PHASES)]
        moment = rng.uniform(0, seconds[phase])
        if number + 1 < first:
            continue
        attempt, wait = _killed(folder, f"kill_{number}", phase, moment)
        there = attempt.progress()
        differing = _resumed(attempt, whole)
        same += not differing
        verdict = "no" if differing else "yes"
        table.add_row(str(number + 1), phase, f"{wait:.2f} s", there, verdict, ", ".join(differing))
        print(f"{number + 1} of {times}: {phase}, {there}, same: {verdict}", file=sys.stderr)
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{same} of {times - first + 1} went on to the identical allocation, figures, trials and MLflow steps"
    )
    return same == times - first + 1


def _seconds(attempt: Attempt) -> dict[str, float]:
    row = json.loads((only_run(attempt.folder, attempt.name) / "result.json").read_text())
    taken = {**row["phases"], "search": row["metrics"]["seconds"], "measurement": row["phases"]["sensitivities"]}
    return {phase: float(taken[phase]) for phase in PHASES}


def _killed(folder: Path, name: str, phase: str, wait: float) -> tuple[Attempt, float]:
    """Kill a run in a phase; return it, and the seconds between the phase's first file and the kill."""
    for number in range(ATTEMPTS):
        attempt = Attempt(folder, f"{name}_{number}")
        process = fork(folder, *RUN, f"name={attempt.name}", cache=attempt.cache)
        deadline = time.monotonic() + PATIENCE
        while not attempt.reached(phase) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(wait / 2**number)
        process.kill()
        process.join()
        if process.exitcode == -9:
            return attempt, wait / 2**number
    raise RuntimeError(f"{name} was over before every kill: {attempt.cache.with_suffix('.err').read_text()}")


def _finish(attempt: Attempt, *arguments: str) -> None:
    process = fork(attempt.folder, *RUN, f"name={attempt.name}", *arguments, cache=attempt.cache)
    process.join()
    if process.exitcode:
        raise RuntimeError(attempt.cache.with_suffix(".err").read_text())


def _resumed(attempt: Attempt, whole: Attempt) -> list[str]:
    """Go on with a killed run; return what differs from the undisturbed one."""
    before = [generation for path in attempt.files("search_state.jsonl") for generation in _generations(path)]
    try:
        _finish(attempt, "resume=auto")
    except RuntimeError as error:
        return [str(error)]
    compared: dict[str, Callable[[Attempt], Any]] = {
        "result": lambda one: outcome(only_run(one.folder, one.name)),
        "MLflow": lambda one: logged(one.folder, one.name),
        "study": lambda one: trials(one.folder, one.name),
        "export": lambda one: {
            name: tensor.tolist()
            for name, tensor in load_file(only_run(one.folder, one.name) / "model" / "packed.safetensors").items()
        },
    }
    found = [what for what, of in compared.items() if of(attempt) != of(whole)]
    (state,) = attempt.files("search_state.jsonl")
    return found if _generations(state)[: len(before)] == before else [*found, "generations scored twice"]


def _generations(state: Path) -> list[tuple[Any, ...]]:
    """Return the generations that are whole in a search state, each with the seconds that it took."""
    text = [line for line in state.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
    return [(line["generation"], line["elite"], line["elapsed"]) for line in map(json.loads, text)]


if __name__ == "__main__":
    main()
