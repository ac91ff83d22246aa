"""Multiruns whose jobs run in processes of a launcher's: one fails or is killed, the others go on."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from evosweep.cli.launch import JOBS
from evosweep.cli.launchers import FAILED, KILLED, ONLY, failures, run_jobs
from tests.cli import TINY, workplace
from tests.faults.processes import PATIENCE, lines, start, wait_for

BARE = ["storage=memory", "export=none", "report=none"]
PATIENT = 3 * PATIENCE  # several processes of one command, each of which loads everything
GENERATIONS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("launched")) as folder:
        yield folder


def kill_worker(process: subprocess.Popen[str], module: str) -> None:
    """Kill one of the processes below a command that run a module."""
    workers = psutil.Process(process.pid).children(recursive=True)
    alive = [worker for worker in workers if worker.status() != psutil.STATUS_ZOMBIE]
    next(worker for worker in alive if module in worker.cmdline()).kill()


def errors_of(process: subprocess.Popen[str]) -> list[str]:
    """Return the lines with errors that a command ended with."""
    _, error = process.communicate(timeout=PATIENT)
    assert process.returncode == 2 and "Traceback" not in error, error
    return [line for line in error.splitlines() if line.startswith("error:")]


def test_joblib_goes_on_after_a_worker_was_killed(folder: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.verbose=0"]
    settings = ["name=joblib", "tracking=none", "sampler=evopress_ilp_scaled", "budget.as_uniform=3,99"]
    process = start(folder, "-m", *TINY, *BARE, *launcher, f"search.generations={GENERATIONS}", *settings)
    state = "runs/joblib/*/0/search_state.jsonl"
    assert wait_for(lambda: any(lines(path) > 3 for path in folder.glob(state)), process)
    kill_worker(process, "joblib.externals.loky.backend.popen_loky_posix")
    (error,) = errors_of(process)
    assert "got 99" in error and error.endswith("(job 2 of 2)")
    (result,) = folder.glob("runs/joblib/*/*/result.json")
    assert result.parent.name == "0" and lines(result.parent / "search_state.jsonl") == GENERATIONS + 2  # it went on


def test_submitit_waits_for_all_where_one_fails_and_one_is_killed(folder: Path) -> None:
    pytest.importorskip("submitit")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    settings = ["name=submitit", "sampler=evopress_ilp_scaled", "budget.as_uniform=3,99,2"]
    process = start(folder, "-m", *TINY, *BARE, *launcher, f"search.generations={GENERATIONS}", *settings)
    state = "runs/submitit/*/0/search_state.jsonl"
    assert wait_for(lambda: any(lines(path) > 3 for path in folder.glob(state)), process)
    kill_worker(process, "submitit.core._submit")
    errors = sorted(errors_of(process), key=lambda line: "got 99" in line)
    assert len(errors) == 2
    assert "got 99" in errors[-1] and errors[-1].endswith("(job 2 of 3)")
    (result,) = folder.glob("runs/submitit/*/*/result.json")
    killed = {"0": 3, "2": 1}[result.parent.name]
    assert KILLED in errors[0] and errors[0].endswith(f"(job {killed} of 3)")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("submitit").experiment_id])
    status = {run.info.run_name: run.info.status for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert list(status.values()) == ["FAILED"]


class TerminatedWorkerError(Exception):
    """As joblib names what it raises."""


def test_a_job_that_is_killed_each_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOBS, "5")
    tried: list[list[int]] = []

    def job() -> None:
        """Two at a time; job 2 ends its worker, and with it whatever runs beside it."""
        only = json.loads(os.environ.get(ONLY, "null")) or range(5)
        left = [number for number in only if not (tmp_path / str(number) / "result.json").is_file()]
        tried.append(list(left))
        for first in range(0, len(left), 2):
            pair = left[first : first + 2]
            for number in pair:
                (tmp_path / str(number)).mkdir(exist_ok=True)
            if 2 in pair:
                raise TerminatedWorkerError
            for number in pair:
                (tmp_path / str(number) / "result.json").write_text("{}")

    run_jobs(job, folder=lambda: tmp_path, again=lambda _: None)
    assert tried == [[0, 1, 2, 3, 4], [2], [3], [4]]
    assert failures(tmp_path) == [(KILLED, 2)]


def test_an_error_of_a_job_is_kept_and_raised(tmp_path: Path) -> None:
    def job() -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="CUDA"):
        run_jobs(job, folder=lambda: tmp_path, again=lambda _: None)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / FAILED).write_text(json.dumps({"job": 7, "error": "RuntimeError: CUDA out of memory"}))
    assert failures(tmp_path) == [("RuntimeError: CUDA out of memory", 7)]
