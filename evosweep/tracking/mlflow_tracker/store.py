"""Opens the MLflow store: creates databases atomically, one process at a time, with bounded waits."""

import logging
import os
import queue
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import mlflow
from alembic.util import CommandError
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from evosweep.core.errors import SettingError
from evosweep.core.files import digest
from evosweep.core.redact import redact

SQLITE = "sqlite:///"
ANSWER = 30  # seconds that a server may take to answer one request; nobody waits for it
LOCK = 60  # seconds to wait for another process that creates the database or the experiment
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox tries again
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it is printed with user and password
}
UNUSABLE = (MlflowException, RequestException, OSError, SQLAlchemyError, CommandError, ImportError, sqlite3.Error)
UNREACHABLE = (MlflowException, RequestException, SQLAlchemyError, ConnectionError, TimeoutError)


def resolved_uri(uri: str | None) -> str:
    """Return the URI that is used: the one given, else MLflow's own choice (``MLFLOW_TRACKING_URI``, ``mlflow.db``)."""
    return uri or str(mlflow.get_tracking_uri())


def is_server(uri: str) -> bool:
    """Return whether a URI names a tracking server."""
    return uri.startswith(("http://", "https://"))


def without_user(uri: str) -> str:
    """Return the address of a server without user and password, as a browser opens it."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def database_of(uri: str) -> Path | None:
    """Return the SQLite file that a URI names; None for a server or another database."""
    return Path(uri.removeprefix(SQLITE).split("?")[0]).absolute() if uri.startswith(SQLITE) else None


def connect(uri: str | None, *, owner: object) -> MlflowClient:
    """Return a client of a store that can be used; a SQLite file that is not there yet is created.

    Args:
        uri: As in ``MlflowTracker``.
        owner: The object whose setting ``uri`` is.

    Raises:
        SettingError: There is no such store, or it belongs to another program or version.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    used = resolved_uri(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # its bars would run through ours
    if is_server(used):
        for name, value in SETTINGS.items():  # MLflow reads them at every request; a user's own values stay
            os.environ.setdefault(name, value)
    try:
        path = database_of(used)
        if path is not None and not path.exists():
            _create(path)
        return MlflowClient(tracking_uri=used)
    except UNUSABLE as error:
        raise unusable(used, owner=owner, error=error) from error


@contextmanager
def alone(uri: str | None, *, owner: object) -> Iterator[None]:
    """Keep other processes of this machine out while a database, an experiment or a parent run is created.

    The lock of a database file lies beside it; that of a server in the folder for temporary files.

    Args:
        uri: As in ``MlflowTracker``.
        owner: The object whose setting ``uri`` is.

    Raises:
        SettingError: Another process holds the lock for too long, or there can be no lock.
        TimeoutError: The same for a server, which is tried again.
    """
    used = resolved_uri(uri)
    path = database_of(used)
    if path is None:
        lock = Path(tempfile.gettempdir()) / f"evosweep-{digest(used)}.lock"
    else:
        lock = path.with_name(f".{path.name}.lock")
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=LOCK)
        held.acquire()
    except Timeout as error:
        if is_server(used):
            raise TimeoutError(f"{lock} has been held for {LOCK} s") from error
        raise SettingError(
            "uri",
            owner=owner,
            allowed="a store that no other process is setting up",
            got=redact(used),
            hint=f"{lock} has been held for {LOCK} s: end that process, or name another uri",
        ) from error
    except OSError as error:
        raise unusable(used, owner=owner, error=error) from error
    try:
        yield
    finally:
        held.release()


def answered(call: Callable[[], Any], *, seconds: float) -> Any:
    """Return what a call returns or raise what it raises, in at most so many seconds; it may go on behind.

    Raises:
        TimeoutError: There was no answer.
    """
    found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            found.put((call(), None))
        except BaseException as error:
            found.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def unusable(uri: str, *, owner: object, error: BaseException) -> SettingError:
    """Return an error that says in one line why a store cannot be used.

    Args:
        uri: Of the store.
        owner: Tracker whose argument ``uri`` is.
        error: What went wrong.
    """
    if is_server(uri):
        allowed = "an MLflow tracking server that answers"
    else:
        allowed = "an MLflow tracking URI that can be written, as sqlite:///mlflow.db"
    return SettingError("uri", owner=owner, allowed=allowed, got=redact(uri), hint=redact(hint(error, uri)))


def hint(error: BaseException, uri: str) -> str:
    """Return what is wrong with a store, or what to do about it."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if is_server(uri):
        if "refused" in text:
            return "nothing listens there"
        slow = "timed out" in text and not isinstance(error, TimeoutError)
        return f"no answer within {os.environ.get('MLFLOW_HTTP_REQUEST_TIMEOUT', ANSWER)} s" if slow else text[:200]
    if isinstance(error, CommandError) or "schema" in str(error):
        return "another program or another version of MLflow made it: mlflow db upgrade, or name a new file"
    if isinstance(error, MlflowException):
        return "MLflow keeps no runs in plain folders" if "://" not in uri or uri.startswith("file:") else text[:200]
    return getattr(error, "strerror", None) or text[:200]


def _create(path: Path) -> None:
    """Let MLflow create its database under a temporary name, then rename it.

    MLflow creates its tables in many transactions. A process that is killed in between leaves a file that no later
    run can use, so only a finished one gets the real name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.new*"):
        old.unlink(missing_ok=True)  # of a process that was killed; the caller holds the lock
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        MlflowClient(tracking_uri=f"{SQLITE}{temporary}").search_experiments(max_results=1)
        with sqlite3.connect(temporary) as database:
            database.execute("pragma wal_checkpoint(truncate)")
        temporary.replace(path)
    finally:
        for left in path.parent.glob(f"{temporary.name}*"):
            left.unlink(missing_ok=True)
