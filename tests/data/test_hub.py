"""Hub datasets: ``datasets`` plays the network where an answer is needed; without one the real refusal is tested."""

import os
import subprocess
import sys
import time

import pytest

from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Silent
from evosweep.data.hub import HubDataset

QUIET = Silent()


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_args, **_options: None)


def stream(monkeypatch: pytest.MonkeyPatch, rows) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, reachable) -> None:
    import datasets

    def unreachable(*_args, **_options):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"hub dataset a/b cannot be read: Couldn't reach the Hub$"):
        HubDataset(path="a/b").documents(progress=QUIET)


def test_hub_rows_are_bounded(monkeypatch, reachable) -> None:
    stream(monkeypatch, ({"text": f"t{n}"} for n in iter(int, 1)))
    assert len(HubDataset(path="a/b", max_documents=5).documents(progress=QUIET)) == 5


def test_a_network_that_fails_in_mid_stream_is_one_line(monkeypatch, reachable) -> None:
    def rows():
        yield {"text": "a"}
        raise TimeoutError("read timed out\nlong story")

    stream(monkeypatch, rows())
    with pytest.raises(DataError, match=r"^data\.path: hub dataset a/b cannot be read: read timed out$"):
        HubDataset(path="a/b").documents(progress=QUIET)


def test_a_bad_column_is_not_called_a_network_error(monkeypatch, reachable) -> None:
    stream(monkeypatch, [{"texts": "a"}])
    with pytest.raises(DataError, match=r"^data\.column: a/b has no column 'text' \(did you mean 'texts'\?\)"):
        HubDataset(path="a/b").documents(progress=QUIET)


def test_a_dataset_without_text_says_so(monkeypatch, reachable) -> None:
    stream(monkeypatch, [{"text": ""}, {"text": None}])
    with pytest.raises(DataError, match=r"^data\.path: hub dataset a/b has no text in its first 9 rows$"):
        HubDataset(path="a/b", max_documents=9).documents(progress=QUIET)


def test_several_configurations_are_listed(monkeypatch, reachable) -> None:
    import datasets

    def several(*_args, **_options):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['de', 'en']\nExample")

    monkeypatch.setattr(datasets, "load_dataset", several)
    with pytest.raises(DataError, match=r"set data\.name; Please pick one .*\['de', 'en'\]$"):
        HubDataset(path="a/b").documents(progress=QUIET)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"path": ""}, "path"), ({"split": 3}, "split"), ({"column": None}, "column"), ({"max_documents": 2}, "max_d")],
)
def test_bad_settings_are_named(changes: dict, setting: str) -> None:
    with pytest.raises(SettingError, match=f"^{setting}"):
        HubDataset(**{"path": "a/b", **changes})


def test_offline_is_told_at_once() -> None:
    """``datasets`` alone would retry for 25 seconds; the endpoint is read at import, hence the process."""
    code = (
        "from evosweep.core.events import Silent; from evosweep.data.hub import HubDataset\n"
        "try: HubDataset(path='a/b').documents(progress=Silent())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**environment, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert done.stdout.startswith(
        "DataError data.path: hub dataset a/b cannot be read: offline, http://127.0.0.1:9 does not answer"
    )
    assert done.stdout.count("\n") == 1 and time.monotonic() - began < 20
