import pytest

from evosweep.core.errors import SettingError
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
