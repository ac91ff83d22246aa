"""Four processes of the same command in one folder at once: each ends as it would alone."""

from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from evosweep.tracking.study.storage import Journal
from tests.cli import TINY, evosweep, workplace, write_corpus
from tests.faults.forked import fork
from tests.faults.processes import PATIENCE, logged, only_run, outcome, trials

COMMAND = [*TINY, "search.generations=5", "sampler=evopress_ilp_scaled", "report=none", "name=same"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("alone")) as folder:
        assert evosweep(*COMMAND) == 0
        yield folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder in which four commands began at once: no database, no store, no measurement was there."""
    folder = tmp_path_factory.mktemp("four")
    write_corpus(folder)
    processes = [fork(folder, *COMMAND, cache=folder / "cache", printed=f"{number}") for number in range(4)]
    for process in processes:
        process.join(PATIENCE)
    errors = [(folder / f"{number}.err").read_text() for number in range(4)]
    assert [process.exitcode for process in processes] == [0] * 4, errors
    assert errors == [""] * 4
    return folder


def runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("runs/same/*/result.json"))


def test_each_finds_what_it_would_alone(alone: Path, four: Path) -> None:
    wanted = outcome(only_run(alone, "same"))
    assert len(runs(four)) == 4 and all(outcome(run) == wanted for run in runs(four))
    assert all((run / "model" / "packed.safetensors").is_file() for run in runs(four))


def test_the_store_is_built_and_the_model_measured_once(four: Path) -> None:
    logs = [(run / "run.log").read_text() for run in runs(four)]
    assert sorted("MB" in log and " built, " in log for log in logs) == [False, False, False, True]
    assert sorted("kl_per_error found" in log for log in logs) == [False, True, True, True]
    assert len([path for path in (four / "cache" / "stores").iterdir() if path.is_dir()]) == 1


def test_each_has_its_run_and_its_study(alone: Path, four: Path) -> None:
    _, wanted = logged(alone, "same")
    client = MlflowClient(tracking_uri=f"sqlite:///{four / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("same").experiment_id])
    assert [run.info.status for run in found] == ["FINISHED"] * 4
    for run in found:
        steps = {
            key: sorted(point.step for point in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        assert steps == wanted
    storage = Journal(path=str(four / "studies" / "same.journal")).open()
    studies = optuna.get_all_study_summaries(storage)
    assert len(studies) == 4
    for summary in studies:
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        mine = [(trial.user_attrs.get("generation"), trial.user_attrs.get("slot")) for trial in study.trials]
        assert mine == trials(alone, "same")
