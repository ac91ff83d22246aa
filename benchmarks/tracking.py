"""What tracking costs a search: 210 units, 128 offspring, real MLflow and Optuna stores.

    python benchmarks/tracking.py [--generations 150] [--second 1.0]

A search whose scoring takes --second a generation (the thread sleeps, as one that waits for a GPU does), without
listeners, and with both of them as a run has them. Also what each of them takes for one generation, and what both
leave on disk, and how long Optuna Dashboard takes to show the study.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from evosweep.cli.job import quiet_libraries
from evosweep.core.events import Event, Listener
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.tracking.behind import Behind
from evosweep.tracking.mlflow_tracker import MlflowTracker
from evosweep.tracking.study.record import StudyRecorder
from evosweep.tracking.study.storage import Journal

KINDS = {
    "self_attn.q_proj": 331776,
    "self_attn.k_proj": 110592,
    "self_attn.v_proj": 110592,
    "self_attn.o_proj": 331776,
    "mlp.gate_proj": 884736,
    "mlp.up_proj": 884736,
    "mlp.down_proj": 884736,
}


class Timed:
    """Notes how long a listener takes."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self.seconds = listener, 0.0

    def on_event(self, event: Event) -> None:
        """Pass it on."""
        began = time.perf_counter()
        self.listener.on_event(event)
        self.seconds += time.perf_counter() - began


class Waiting:
    """A scorer that sleeps as long as a GPU would work, and likes some units more than others."""

    def __init__(self, units: int, second: float) -> None:
        self.weights, self.second = np.random.default_rng(0).normal(size=units), second

    def score(self, genomes: Any, *, generation: int, stage: int, tokens: int) -> Any:
        """Return a linear fitness."""
        del generation, tokens
        time.sleep(self.second if stage == 0 else 0)
        return 100 + genomes @ self.weights

    def race(self, genomes: Any, **_: Any) -> Any:
        """Never asked."""
        raise NotImplementedError

    def validate(self, genome: Any) -> dict[str, float]:
        """Return the same as both figures."""
        return {"kl": float(100 + genome @ self.weights), "ppl": 1.0}


def problem() -> Problem:
    """Return SmolLM2's shape with five levels."""
    units = [
        Unit(
            f"model.layers.{block}.{kind}",
            numel,
            block,
            tuple(Level(f"{bits}bit", numel * bits, nominal=Nominal("bits", bits)) for bits in range(2, 7)),
        )
        for block in range(30)
        for kind, numel in KINDS.items()
    ]
    return Problem(tuple(units), budget=sum(unit.levels[1].cost for unit in units))


def searched(listeners: list[Any], options: argparse.Namespace) -> float:
    """Return the seconds of a search."""
    stages = [{"survivors": 8, "tokens": 1}, {"survivors": 1, "tokens": 1}]
    plan = Plan.of(generations=options.generations, stages=stages)
    began = time.perf_counter()
    run_search(
        name="tracked",
        sampler=EvoPressSampler(problem(), seed=0, offspring=128),
        plan=plan,
        scorer=Waiting(210, options.second),
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=listeners,
    )
    for listener in listeners:
        listener.wait()
    return time.perf_counter() - began


def dashboard(path: Path) -> dict[str, float]:
    """Return how long Optuna Dashboard takes to answer, and how much it sends, for the study of a journal."""
    port = 8901
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), str(path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        began = time.perf_counter()
        studies = _fetched(f"http://127.0.0.1:{port}/api/studies", tries=120)
        opened = time.perf_counter() - began
        study = json.loads(studies)["study_summaries"][0]["study_id"]
        began = time.perf_counter()
        whole = _fetched(f"http://127.0.0.1:{port}/api/studies/{study}?after=0")
        first, size, trials = time.perf_counter() - began, len(whole), len(json.loads(whole)["trials"])
        began = time.perf_counter()  # a poll asks for what is new only
        _fetched(f"http://127.0.0.1:{port}/api/studies/{study}?after={trials - 128}")
        poll = time.perf_counter() - began
        began = time.perf_counter()
        importance = len(_fetched(f"http://127.0.0.1:{port}/api/studies/{study}/param_importances"))
        return {
            "list_seconds": opened,
            "study_seconds": first,
            "poll_seconds": poll,
            "megabytes": size / 1e6,
            "trials": trials,
            "importance_seconds": time.perf_counter() - began,
            "importance_bytes": importance,
        }
    finally:
        server.terminate()
        server.wait()


def _fetched(url: str, *, tries: int = 1) -> bytes:
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(url, timeout=120) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            if not left:
                raise
            time.sleep(0.25)
    raise AssertionError("unreachable")


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=150)
    parser.add_argument("--second", type=float, default=1.0)
    options = parser.parse_args()
    quiet_libraries()
    alone = searched([], options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        journal = Journal(path=str(folder / "study.journal"), artifacts=str(folder / "pictures"))
        study = Timed(StudyRecorder(storage=journal.open(), name="tracked", artifacts=journal.artifact_store()))
        tracker = MlflowTracker(experiment="tracked", uri=f"sqlite:///{folder / 'mlflow.db'}")
        tracker.client.create_experiment("tracked", artifact_location=str(folder / "mlruns"))
        tracker.start("tracked", params={}, tags={})
        mlflow = Timed(tracker)
        both = searched([Behind(study), Behind(mlflow)], options)
        sizes = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir() if path.is_file()}
        shown = dashboard(folder / "study.journal")
        for name in ("mlruns", "pictures"):
            sizes[name] = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()) / 1e6
    print(
        json.dumps(
            {
                **vars(options),
                "seconds_without": alone,
                "seconds_with_both": both,
                "overhead_percent": 100 * (both / alone - 1),
                "optuna_ms_a_generation": 1000 * study.seconds / options.generations,
                "mlflow_ms_a_generation": 1000 * mlflow.seconds / options.generations,
                "megabytes": sizes,
                "dashboard": shown,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
