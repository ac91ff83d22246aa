"""Where Optuna keeps studies."""

from pathlib import Path

from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from evosweep.core.errors import SettingError


def journal(*, path: str) -> JournalStorage:
    """Return the storage of a journal file, made if it is not there.

    Args:
        path: The file; ``optuna-dashboard`` opens it.

    Raises:
        SettingError: It cannot be written there.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The open lock works on every file system and platform, the default symlink lock does not.
        return JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))
    except OSError as error:
        raise SettingError(
            "storage.path", allowed="a file that can be written", got=path, hint=error.strerror or str(error)
        ) from error


def memory() -> InMemoryStorage:
    """Return a storage that ends with the process."""
    return InMemoryStorage()


