"""A measurement that was killed goes on after its last step, and gives the same bits."""

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from evosweep.core.events import Silent
from evosweep.evaluate.sensitivity import MEASURES, measure
from evosweep.evaluate.steps import Steps
from tests.store.test_cache import read_only
from tests.store.test_store import Heard

TOKENS = 192  # six windows


class StopsAt(Heard):
    """Ends a measurement, as Ctrl-C does, before an item."""

    def __init__(self, item: int) -> None:
        super().__init__()
        self.item = item
        self.done = 0

    def track(self, items: Sequence, *, description: str, tokens: int | None = None) -> Iterable:
        for index, item in enumerate(items):
            if index == self.item:
                raise KeyboardInterrupt
            yield item
            self.done += 1


class WaitsAt(StopsAt):
    """Waits before an item to be killed."""

    def track(self, items: Sequence, *, description: str, tokens: int | None = None) -> Iterable:
        for index, item in enumerate(items):
            if index == self.item:
                time.sleep(600)
            yield item


@pytest.fixture
def measured(evaluator, store, make_store_problem, tmp_path, monkeypatch):
    """Returns a function that measures a column in a cache of this name."""
    problem = make_store_problem(store)

    def of(column: str, cache: str, progress=None) -> dict:
        monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / cache))
        return measure(column, evaluator, problem, tokens=TOKENS, seed=0, progress=progress or Silent())[0]

    return of


@pytest.mark.parametrize("column", MEASURES)
def test_every_measurement_goes_on_after_its_last_step(measured, tmp_path, column: str) -> None:
    whole = measured(column, "whole")
    with pytest.raises(KeyboardInterrupt):
        measured(column, "cache", StopsAt(2))
    rest = StopsAt(-1)
    again = measured(column, "cache", rest)
    assert any(f"2 of {rest.done + 2} steps were done before" in line for line in rest.lines)
    assert again == whole
    (left,) = (path.suffix for path in (tmp_path / "cache" / "columns").iterdir() if path.suffix != ".lock")
    assert left == ".json"


def test_a_measurement_that_is_killed_goes_on(measured, tmp_path) -> None:
    whole = measured("kl_around_top", "whole")
    arguments = ("kl_around_top", "cache", WaitsAt(2))
    process = multiprocessing.get_context("fork").Process(target=measured, args=arguments)
    process.start()
    files = (tmp_path / "cache" / "columns").glob
    while process.is_alive() and sum(len(path.read_text().splitlines()) for path in files("*.steps")) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    rest = StopsAt(-1)
    assert measured("kl_around_top", "cache", rest) == whole
    assert "2 of " in rest.lines[0] and "steps were done before" in rest.lines[0]


@pytest.mark.parametrize("damage", ["cut short", "changed", "another step", "no JSON"])
def test_steps_are_used_as_far_as_they_are_whole(tmp_path, damage: str) -> None:
    path = tmp_path / "some.steps"
    values = [0.1, float("nan"), float("inf"), 1 / 3]
    rows = [[value, -value] for value in values]
    with pytest.raises(KeyboardInterrupt):
        Steps(path).run(range(4), lambda row: rows[row], progress=StopsAt(3), description="rows")
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = {
        "cut short": lines[2][:-1],
        "changed": lines[2].replace('"values": [Infinity', '"values": [1.0'),
        "another step": lines[1],
        "no JSON": "\0\0\n",
    }[damage]
    path.write_text("".join(lines))
    rest = StopsAt(-1)
    found = Steps(path).run(range(4), lambda row: rows[row], progress=rest, description="rows")
    assert rest.done == 2
    np.testing.assert_array_equal(np.array(found), np.array(rows))


def test_a_cache_that_cannot_be_written_does_not_end_a_measurement(measured, monkeypatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "columns").mkdir()
        whole = measured("kl_per_error", "whole")
        heard = Heard()
        with read_only(Path(name)):
            assert measured("kl_per_error", name, heard) == whole
    assert "kl_per_error will not be kept: the cache folder" in heard.lines[0]


def test_of_four_processes_one_measures(measured, tmp_path) -> None:
    def one(number: int) -> None:
        heard = Heard()
        values = measured("kl_around_top", "cache", heard)
        (tmp_path / f"{number}.json").write_text(json.dumps([values, any("found" in line for line in heard.lines)]))

    whole = measured("kl_around_top", "whole")
    processes = [multiprocessing.get_context("fork").Process(target=one, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(4)]
    assert all(values == whole for values, _ in results)
    assert sorted(found for _, found in results) == [False, True, True, True]
