"""A disk that fills up in mid-search: one line says so, what stood before it stands, and the run goes on from there."""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.cli import TINY, evosweep, workplace, write_corpus
from tests.faults.forked import fork
from tests.faults.processes import PATIENCE, lines, logged, only_run, outcome, trials

SEARCH = [*TINY, "search.generations=30", "export=none", "report=none"]
ROOM = 64  # megabytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("full")) as folder:
        assert evosweep(*SEARCH, "name=whole") == 0
        yield folder


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Give a disk of its own, held in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Write a file that takes all of a disk's room."""
    with (disk / "filler").open("wb", buffering=0) as file:
        free = os.statvfs(disk)
        for share in (0.9, 0.09):
            with suppress(OSError):
                start = file.seek(0, os.SEEK_END)
                os.posix_fallocate(file.fileno(), start, int(share * free.f_bavail * free.f_bsize))
        file.seek(0, os.SEEK_END)
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))


def states(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f"runs/{name}/*/search_state.jsonl"))


def once_in_mid_search(folder: Path, name: str, process: ForkServerProcess, act: Callable[[], object]) -> None:
    """Do something to a run after its second generation, and wait until its process ends."""
    deadline = time.monotonic() + PATIENCE
    while not any(lines(path) >= 3 for path in states(folder, name)):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    act()
    process.join(PATIENCE)


def test_a_state_that_cannot_be_written_on_is_cut_and_goes_on(folder: Path) -> None:
    bare = [*SEARCH, "name=cut", "tracking=none", "storage=memory"]
    cache = folder / "cache"
    process = fork(folder, *bare, cache=cache)

    def limit() -> None:
        """Let no file grow longer than the state is, and half a generation more."""
        size = states(folder, "cut")[0].stat().st_size + 300
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    once_in_mid_search(folder, "cut", process, limit)
    run = only_run(folder, "cut")
    assert process.exitcode == 2
    error = cache.with_suffix(".err").read_text()
    assert error == (
        f"error: a file could not be written: File too large; make room, then go on with evosweep resume {run}\n"
    )
    (state,) = states(folder, "cut")
    assert not state.read_text().endswith("\n")  # the line that did not fit
    again = fork(folder, *bare, "resume=auto", cache=cache)
    again.join(PATIENCE)
    assert again.exitcode == 0 and outcome(run) == outcome(only_run(folder, "whole"))
    assert "was cut short; going on after generation" in (run / "run.log").read_text()


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with small_disk(tmp_path / "disk") as disk:
        write_corpus(disk)
        process = fork(disk, *SEARCH, "name=whole", cache=cache)
        once_in_mid_search(disk, "whole", process, lambda: fill(disk))
        run = only_run(disk, "whole")
        error = cache.with_suffix(".err").read_text()
        assert process.exitcode == 2 and error.count("\n") == 1, error
        assert "No space left on device; make room, then go on with evosweep resume" in error
        (disk / "filler").unlink()
        again = fork(disk, *SEARCH, "name=whole", "resume=auto", cache=cache)
        again.join(PATIENCE)
        assert again.exitcode == 0, cache.with_suffix(".err").read_text()
        assert only_run(disk, "whole") == run and outcome(run) == outcome(only_run(folder, "whole"))
        assert logged(disk, "whole") == logged(folder, "whole") and trials(disk, "whole") == trials(folder, "whole")
