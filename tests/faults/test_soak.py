"""A search of some hundred generations opens no more files and starts no more threads as it goes on."""

from pathlib import Path

import pytest

from benchmarks.soak import TINY, figures, run


@pytest.mark.slow
def test_open_files_and_threads_stay(tmp_path: Path) -> None:
    looks, code, shown = run(tmp_path, [*TINY, "search.generations=200", "search.offspring=4"])
    assert code == 0, shown
    found = figures(tmp_path, looks)
    first, second = found["files_open"]
    assert first[0] == second[0]  # between writes
    assert found["threads"][0] == found["threads"][1]
