import sqlite3

import optuna
import pytest
from mlflow import MlflowClient

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.tracking.mlflow_tracker import MlflowTracker


def test_an_uri_that_is_none_is_one_line() -> None:
    tracker = MlflowTracker(experiment="x", uri="nonsense://here")
    with pytest.raises(SettingError, match=r"uri") as caught:
        tracker.start("x", params={}, tags={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", ["", None, 3])
def test_experiments_have_names(experiment) -> None:
    with pytest.raises(SettingError, match=r"experiment"):
        MlflowTracker(experiment=experiment)


def test_closing_what_never_began_does_nothing(in_tmp) -> None:
    MlflowTracker(experiment="x").close("FAILED", reason="before the start")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("uri", ["./runs", "file:./runs", "sqlite:////proc/nowhere/mlflow.db"])
def test_where_no_runs_can_be_kept_is_one_line(uri: str, in_tmp) -> None:
    with pytest.raises(SettingError, match=r"uri must be an MLflow tracking URI that can be w") as caught:
        MlflowTracker(experiment="x", uri=uri).start("x", params={}, tags={})
    assert "\n" not in str(caught.value)


def test_an_experiment_that_was_deleted_says_how_to_have_it_back(in_tmp) -> None:
    tracker = MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp}/mlflow.db", system_metrics=False)
    found = tracker.client.create_experiment("x", artifact_location=str(in_tmp / "artifacts"))
    tracker.client.delete_experiment(found)
    with pytest.raises(EvosweepError, match=f"was deleted: choose another name=.* --experiment-id {found}"):
        tracker.start("x", params={}, tags={})


def test_a_database_of_another_version_or_program_says_what_to_do(in_tmp) -> None:
    MlflowClient(tracking_uri="sqlite:///newer.db").create_experiment("x")
    with sqlite3.connect("newer.db") as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    optuna.create_study(storage="sqlite:///optuna.db")
    for name in ("newer.db", "optuna.db"):
        with pytest.raises(SettingError, match=r"uri .*mlflow db upgrade, or name a new file") as caught:
            MlflowTracker(experiment="y", uri=f"sqlite:///{in_tmp / name}").start("x", params={}, tags={})
        assert "\n" not in str(caught.value)


def test_a_journal_of_optuna_s_is_no_database(in_tmp) -> None:
    (in_tmp / "x.journal").write_text('{"op_code": 0}\n' * 99)
    with pytest.raises(SettingError, match=r"uri .*file is not a database"):
        MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp / 'x.journal'}").start("x", params={}, tags={})


@pytest.fixture
def tracker(in_tmp) -> MlflowTracker:
    return MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp / 'mlflow.db'}", system_metrics=False)


@pytest.mark.parametrize("multirun", [None, "many"])
def test_a_run_that_the_environment_names_is_gone_on_with(tracker: MlflowTracker, monkeypatch, multirun) -> None:
    given = tracker.client.create_run(tracker.client.create_experiment("x")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    opened = tracker.start("x", params={"sampler": "ilp"}, tags={"a": "b"}, multirun=multirun)
    run = tracker.client.get_run(opened)
    assert run.data.params == {"sampler": "ilp"} and run.data.tags["a"] == "b"
    assert (opened == given) == (multirun is None)
    assert run.data.tags.get("mlflow.parentRunId") == (given if multirun else None)


@pytest.mark.parametrize("multirun", [None, "many"])
def test_a_run_that_is_over_or_unknown_is_not_gone_on_with(tracker: MlflowTracker, monkeypatch, multirun) -> None:
    given = tracker.client.create_run(tracker.client.create_experiment("x")).info.run_id
    tracker.client.set_terminated(given)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with pytest.raises(SettingError, match=r"MLFLOW_RUN_ID must be a run that is not over, got .* unset MLFLOW_RUN_ID"):
        tracker.start("x", params={}, tags={}, multirun=multirun)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    with pytest.raises(SettingError, match="MLFLOW_RUN_ID must be a run of this store"):
        tracker.start("x", params={}, tags={}, multirun=multirun)
    assert len(tracker.client.search_runs(["1"])) == 1


def test_an_experiment_that_was_there_gets_our_view_and_keeps_its_own_tags(tracker: MlflowTracker) -> None:
    made = tracker.client.create_experiment("x", tags={"mlflow.experimentKind": "genai_development", "mine": "1"})
    tracker.start("x", params={}, tags={})
    tags = tracker.client.get_experiment(made).tags
    assert tags["mlflow.experimentKind"] == "genai_development" and tags["mine"] == "1"
    assert "result/kl" in tags["mlflow.sharedViewState.evosweep"]
