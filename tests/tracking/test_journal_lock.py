"""The lock of a journal excludes processes, and is free when its holder is killed."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileOpenLock

from evosweep.tracking.study.journal_lock import OwnedLock

FORK = multiprocessing.get_context("fork")
TIMES = 40


def hold(path: str) -> None:
    OwnedLock(path).acquire()
    os._exit(0)  # as after kill -9: the lock stays


def count(path: str, numbers: Path) -> None:
    lock = OwnedLock(path)
    for _ in range(TIMES):
        lock.acquire()
        known = int(numbers.read_text())
        time.sleep(0.0005)
        numbers.write_text(str(known + 1))
        lock.release()


def ended(*processes) -> list[int]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_never_have_it_at_once_though_a_third_died_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "a.journal")
    numbers = tmp_path / "numbers"
    numbers.write_text("0")
    dead = FORK.Process(target=hold, args=(path,))
    dead.start()
    assert ended(dead) == [0] and Path(f"{path}.lock").is_file()
    counting = [FORK.Process(target=count, args=(path, numbers)) for _ in range(3)]
    for process in counting:
        process.start()
    assert ended(*counting) == [0, 0, 0] and numbers.read_text() == str(3 * TIMES)
    assert not Path(f"{path}.lock").exists()


def test_optuna_s_own_lock_and_this_one_exclude_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "a.journal")
    optunas = JournalFileOpenLock(path)
    optunas.acquire()
    process = FORK.Process(target=hold, args=(path,))
    process.start()
    process.join(0.3)
    assert process.is_alive()
    optunas.release()
    assert ended(process) == [0]


def test_a_lock_that_is_not_held_is_not_released(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not possess lock"):
        OwnedLock(str(tmp_path / "a.journal")).release()
