"""Optuna storages of studies: a journal file or memory, and how much of a search is recorded."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from evosweep.core.checks import check_choice
from evosweep.core.errors import SettingError
from evosweep.tracking.study.journal_lock import OwnedLock

RECORD = ("compact", "elites", "all")
CHUNK = 2**16  # bytes read at once
SQLITE = b"SQLite format 3\0"


class Journal:
    """A journal file: append-only, quick for thousands of trials, opened by ``optuna-dashboard``.

    Args:
        path: The file, made if it is not there.
        record: What becomes a parameter of a trial. ``compact``: of elites, the true bits per weight by depth and
            by kind of layer; ``elites``: of elites, the level of every unit; ``all``: of every candidate, the
            level of every unit, at some ten times the size. The levels themselves are kept always, as one string.
        artifacts: Folder for the elites' pictures and the report's, ``--artifact-dir`` of ``optuna-dashboard``; null
            keeps none.

    Raises:
        SettingError: An unknown ``record``, or (by ``open``) a file that is no journal or cannot be written.
    """

    def __init__(self, *, path: str, record: str = "compact", artifacts: str | None = None) -> None:
        if not isinstance(path, str) or not path:
            raise SettingError("path", allowed="the path of a journal file", got=path)
        if artifacts is not None and not (isinstance(artifacts, str) and artifacts):
            raise SettingError("artifacts", allowed="a folder, or null for no pictures", got=artifacts)
        self.path = Path(path)
        self.record = check_choice("record", record, RECORD)
        self.artifacts = artifacts
        self.repaired = ""
        if self.path.exists() and not self.path.is_file():
            kind = "a folder" if self.path.is_dir() else "a device"
            raise SettingError("path", allowed="a file that can be written", got=path, hint=f"that is {kind}")
        found = _foreign(self.path) if self.path.is_file() else ""
        if found:
            raise SettingError("path", allowed="a journal file", got=path, hint=f"that is {found}")

    def open(self) -> BaseStorage:
        """Return the storage, its file and folder made if they are not there.

        A last line that was not written to its end (full disk, power loss) is cut off; ``repaired`` then says so.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = OwnedLock(str(self.path))
            if self.path.is_file():
                with _held(lock):
                    cut = cut_torn_line(self.path)
                if cut:
                    self.repaired = f"{self.path}: {cut} bytes of a line that was not written to its end were cut off"
            return JournalStorage(JournalFileBackend(str(self.path), lock_obj=lock))
        except OSError as error:
            raise SettingError(
                "path",
                owner=self,
                allowed="a file that can be written",
                got=str(self.path),
                hint=error.strerror or str(error),
            ) from error

    def artifact_store(self) -> FileSystemArtifactStore | None:
        """Return the store of pictures, its folder made if it is not there; None if none are kept."""
        return open_artifacts(self.artifacts, owner=self)


class Memory:
    """Studies that end with the process.

    Args:
        record: As in ``Journal``.
    """

    repaired = ""

    def __init__(self, *, record: str = "compact") -> None:
        self.record = check_choice("record", record, RECORD)

    def open(self) -> BaseStorage:
        """Return a new one."""
        return InMemoryStorage()

    def artifact_store(self) -> None:
        """Return nothing: pictures are kept in folders."""


def lighten(study: optuna.Study, numbers: Iterable[int]) -> None:
    """Drop from a journal's copy in memory what its file holds of finished trials, by far the most of a long search.

    A journal storage keeps all that it has written; nothing here reads it again.

    Args:
        study: Whose trials these are; in any storage but a journal, nothing changes.
        numbers: Of the trials.
    """
    storage = study._storage
    if not isinstance(storage, JournalStorage):
        return
    for number in numbers:
        trial = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study._study_id, number))
        trial.user_attrs = {}
        trial.intermediate_values = {}


def open_artifacts(folder: str | None, *, owner: object) -> FileSystemArtifactStore | None:
    """Return a store of pictures in a folder, made if it is not there; None without a folder.

    Raises:
        SettingError: The folder cannot be written.
    """
    if folder is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # it can be written
    except OSError as error:
        raise SettingError(
            "artifacts",
            owner=owner,
            allowed="a folder that can be written",
            got=folder,
            hint=error.strerror or str(error),
        ) from error
    return FileSystemArtifactStore(folder)


def cut_torn_line(path: Path) -> int:
    """Cut a journal back to its last whole line; return the bytes that were cut off. The caller holds its lock.

    A writer that appends after a torn line leaves one line that is no JSON, so the last line is also read.
    """
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = _start_of_line(file, end)
            file.seek(start)
            line = file.read(end - start)
            if line.endswith(b"\n") and _is_json(line):
                break
            end = start
        if end < size:
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        return size - end


def _start_of_line(file: BinaryIO, end: int) -> int:
    """Return where the line begins whose last byte is before ``end``."""
    position = end - 1
    while position > 0:
        step = min(CHUNK, position)
        file.seek(position - step)
        found = file.read(step).rfind(b"\n")
        if found >= 0:
            return position - step + found + 1
        position -= step
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def _held(lock: OwnedLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _foreign(path: Path) -> str:
    """Return what a file is that is no journal; nothing for a journal, or an empty file."""
    with path.open("rb") as file:
        line = file.readline(2**20)
    if line.startswith(SQLITE):
        return "an SQLite database; MLflow's own, perhaps: each needs a file of its own"
    try:
        entry = json.loads(line or '{"op_code": null}')
    except ValueError:
        entry = None
    return "" if isinstance(entry, dict) and "op_code" in entry else "something else"
