"""A search of two objectives from the command line to the export of any of its points."""

import json
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest

from evosweep.core.results import read_result
from tests.cli import TINY, evosweep, workplace

SEARCH = [
    "sampler=nsga2_evopress",
    "sampler.population_size=6",
    "search.generations=3",
    "search.offspring=8",
    "search.final=512",
    "budget.bits_per_weight=5",
    "report.artifacts=[{_target_: evosweep.tracking.artifacts.pareto_front.ParetoFront}]",
    "export=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("front")) as folder:
        assert evosweep(*TINY, *SEARCH, "name=front") == 0
        yield folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (found,) = folder.glob("runs/front/*/")
    return found


def test_no_point_of_the_front_dominates_another(run: Path) -> None:
    front = read_result(run / "result.json")["front"]
    sizes = np.array([point["size_mb"] for point in front])
    losses = np.array([point["search_loss"] for point in front])
    assert len(front) >= 3 and (np.diff(sizes) < 0).all() and (np.diff(losses) > 0).all()
    assert front[0]["bits_per_weight"] <= 5
    table = json.loads((run / "report" / "front.json").read_text())
    assert table["columns"][0] == "point" and len(table["data"]) == len(front)


def test_optuna_has_the_front_as_a_study_of_two_objectives(folder: Path, run: Path) -> None:
    (journal,) = folder.glob("studies/*front*")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    (name,) = [name for name in optuna.get_all_study_names(storage) if name.endswith(" front")]
    study = optuna.load_study(study_name=name, storage=storage)
    front = read_result(run / "result.json")["front"]
    assert len(study.directions) == 2 and study.metric_names == ["size_mb", "search_loss"]
    assert sorted(trial.values for trial in study.best_trials) == sorted(
        [point["size_mb"], point["search_loss"]] for point in front
    )


def test_mlflow_has_the_hypervolume_of_every_generation_and_the_front(folder: Path, run: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run_id = read_result(run / "result.json")["mlflow_run"]
    names = [name for name in client.get_run(run_id).data.metrics if "hypervolume" in name]
    assert len(names) == 1 and len(client.get_metric_history(run_id, names[0])) == 4
    kept = [file.path for place in (None, "report") for file in client.list_artifacts(run_id, place)]
    assert {"front.json", "front.png"} <= {Path(path).name for path in kept}


def test_any_point_is_exported_later(run: Path, capfd) -> None:
    front = read_result(run / "result.json")["front"]
    assert evosweep("export", str(run), "export=packed", f"point={front[-1]['point']}") == 0
    target = run / f"point_{front[-1]['point']}"
    exported = json.loads((target / "model" / "allocation.json").read_text())["allocation"]
    assert exported == front[-1]["allocation"]
    row = read_result(target / "result.json")
    assert row["size_mb"] == front[-1]["size_mb"] and row["export"]["max_logit_difference"] < 1e-4
    assert not (run / "model").exists() and read_result(run / "result.json")["export"] == {}
    assert evosweep("export", str(run), "point=77") == 2
    assert "point must be one of 0 (" in capfd.readouterr().err


def test_a_stopped_search_goes_on_to_the_same_front(folder: Path, run: Path) -> None:
    before = read_result(run / "result.json")
    state = run / "search_state.jsonl"
    lines = state.read_text().splitlines(keepends=True)
    state.write_text("".join(lines[:3]))
    (run / "result.json").unlink()
    assert evosweep(*TINY, *SEARCH, "name=front", f"resume={run}") == 0
    after = read_result(run / "result.json")
    assert after["front"] == before["front"] and after["tokens"] == before["tokens"]


def test_racing_cannot_compare_sizes(folder: Path, capfd) -> None:
    assert evosweep(*TINY, *SEARCH, "search.racing=0.05", "name=raced") == 2
    assert "search.racing must be null" in capfd.readouterr().err
