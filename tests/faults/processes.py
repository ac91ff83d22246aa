"""Commands as processes of their own, which tests stop and kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
from mlflow import MlflowClient

from evosweep.core.results import read_result
from evosweep.tracking.study.storage import Journal

PATIENCE = 120.0  # seconds for anything


def start(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "evosweep")) -> subprocess.Popen[str]:
    """Start a command in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> bool:
    """Return whether something became true before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def lines(path: Path) -> int:
    """Return how many lines a file has; 0 where there is none."""
    return path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process as the kernel does when memory ends."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


def only_run(folder: Path, name: str) -> Path:
    """Return the folder of the only run of a name."""
    (path,) = folder.glob(f"runs/{name}/*/config.yaml")
    return path.parent


def outcome(run: Path) -> dict:
    """Return what a run found, without what depends on the clock."""
    row = read_result(run / "result.json")
    state = [json.loads(line) for line in (run / "search_state.jsonl").read_text().splitlines()][1:]
    generations = [{key: line[key] for key in ("elite", "candidates", "tokens", "validation")} for line in state]
    found = {key: row[key] for key in ("kl", "ppl", "tokens", "bits_per_weight", "search_loss")}
    allocation = json.loads((run / "allocation.json").read_text())["allocation"]
    return {"row": found, "generations": generations, "allocation": allocation}


def logged(folder: Path, name: str) -> tuple[list[str], dict[str, list[int]]]:
    """Return the statuses of an experiment's MLflow runs, and all steps of every metric of the only one."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    steps = {
        key: sorted(point.step for point in client.get_metric_history(runs[0].info.run_id, key))
        for key in runs[0].data.metrics
    }
    return [run.info.status for run in runs], steps


def trials(folder: Path, name: str) -> list[tuple]:
    """Return generation and slot of every trial of the only study of a name, in order."""
    storage = Journal(path=str(folder / "studies" / f"{name}.journal")).open()
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    return [(trial.user_attrs.get("generation"), trial.user_attrs.get("slot")) for trial in study.trials]
