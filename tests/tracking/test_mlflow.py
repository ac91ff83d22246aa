import pytest

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.tracking.mlflow import MlflowTracker


def test_an_uri_that_is_none_is_one_line() -> None:
    tracker = MlflowTracker(experiment="x", uri="nonsense://here")
    with pytest.raises(SettingError, match=r"tracking\.uri") as caught:
        tracker.start("x", params={}, tags={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", ["", None, 3])
def test_experiments_have_names(experiment) -> None:
    with pytest.raises(SettingError, match=r"tracking\.experiment"):
        MlflowTracker(experiment=experiment)


def test_closing_what_never_began_does_nothing(in_tmp) -> None:
    MlflowTracker(experiment="x").close("FAILED", reason="before the start")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("uri", ["./runs", "file:./runs", "sqlite:////proc/nowhere/mlflow.db"])
def test_where_no_runs_can_be_kept_is_one_line(uri: str, in_tmp) -> None:
    with pytest.raises(SettingError, match=r"tracking\.uri must be an MLflow tracking URI that can be w") as caught:
        MlflowTracker(experiment="x", uri=uri).start("x", params={}, tags={})
    assert "\n" not in str(caught.value)


def test_an_experiment_that_was_deleted_says_how_to_have_it_back(in_tmp) -> None:
    tracker = MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp}/mlflow.db", system_metrics=False)
    found = tracker.client.create_experiment("x", artifact_location=str(in_tmp / "artifacts"))
    tracker.client.delete_experiment(found)
    with pytest.raises(EvosweepError, match=f"was deleted: choose another name=.* --experiment-id {found}"):
        tracker.start("x", params={}, tags={})
