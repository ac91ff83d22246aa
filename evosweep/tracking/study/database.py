"""Optuna storage in a database server, for studies that several machines write."""

import time

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from evosweep.core.checks import check_choice
from evosweep.core.errors import SettingError
from evosweep.core.redact import redact
from evosweep.tracking.behind import one_line
from evosweep.tracking.study.storage import RECORD, open_artifacts

TRIES = 8  # to open a database in which other processes are creating Optuna's tables at the same moment
PAUSE = 0.25  # seconds before the second try, twice as long before the third ...
LONGEST_PAUSE = 2.0


class Database:
    """A database by its SQLAlchemy URL; PostgreSQL wants ``pip install psycopg[binary]``.

    Args:
        url: As ``postgresql+psycopg://user:password@host/name``; passwords are masked wherever settings are kept.
        record: What becomes a parameter of a trial, as in ``storage.Journal``.
        artifacts: Folder for the elites' pictures; null keeps none.

    Raises:
        SettingError: A setting cannot be used, or (by ``open``) the database cannot be.
    """

    repaired = ""

    def __init__(self, *, url: str, record: str = "compact", artifacts: str | None = None) -> None:
        if not isinstance(url, str) or "://" not in url:
            raise SettingError(
                "url", allowed="a database URL, as postgresql+psycopg://user:password@host/name", got=url
            )
        self.url = url
        self.record = check_choice("record", record, RECORD)
        self.artifacts = artifacts

    def open(self) -> BaseStorage:
        """Return the storage, its tables created if they are not there.

        Processes that find an empty database at once all create the tables; those that lose the race try again.
        """
        pause = PAUSE
        for remaining in reversed(range(TRIES)):
            try:
                return RDBStorage(self.url)
            except (IntegrityError, ProgrammingError) as error:
                if not remaining:
                    raise self._unusable(error) from error
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except (ImportError, ArgumentError, SQLAlchemyError, RuntimeError) as error:
                raise self._unusable(error) from error
        raise AssertionError("unreachable: the last try returns or raises")

    def artifact_store(self) -> FileSystemArtifactStore | None:
        """Return the store of pictures, its folder made if it is not there; None if none are kept."""
        return open_artifacts(self.artifacts, owner=self)

    def _unusable(self, error: Exception) -> SettingError:
        return SettingError(
            "url",
            owner=self,
            allowed="the URL of a database that answers and can be written",
            got=redact(self.url),
            hint=redact(one_line(error)),
        )
