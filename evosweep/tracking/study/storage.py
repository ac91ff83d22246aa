"""Where Optuna keeps studies, and how much of a search is kept there."""

import json
from pathlib import Path

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from evosweep.core.checks import check_choice
from evosweep.core.errors import SettingError

RECORD = ("compact", "elites", "all")
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
        self.path = Path(path)
        self.record = check_choice("record", record, RECORD)
        self.artifacts = artifacts
        found = _foreign(self.path) if self.path.is_file() else ""
        if found:
            raise SettingError("path", allowed="a journal file", got=path, hint=f"that is {found}")

    def open(self) -> BaseStorage:
        """Return the storage, its file and folder made if they are not there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The open lock works on every file system and platform, the default symlink lock does not.
            return JournalStorage(JournalFileBackend(str(self.path), lock_obj=JournalFileOpenLock(str(self.path))))
        except OSError as error:
            raise SettingError(
                "path",
                owner=self,
                allowed="a file that can be written",
                got=str(self.path),
                hint=error.strerror or str(error),
            ) from error

    def artifact_store(self) -> FileSystemArtifactStore | None:
        """Return where pictures go, made if it is not there."""
        if self.artifacts is None:
            return None
        try:
            Path(self.artifacts).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(
                "artifacts",
                owner=self,
                allowed="a folder that can be written",
                got=self.artifacts,
                hint=error.strerror or str(error),
            ) from error
        return FileSystemArtifactStore(self.artifacts)


class Memory:
    """Studies that end with the process.

    Args:
        record: As in ``Journal``.
    """

    def __init__(self, *, record: str = "compact") -> None:
        self.record = check_choice("record", record, RECORD)

    def open(self) -> BaseStorage:
        """Return a new one."""
        return InMemoryStorage()

    def artifact_store(self) -> None:
        """Return nothing: pictures are kept in folders."""


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
