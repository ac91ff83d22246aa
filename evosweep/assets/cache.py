"""The folder of downloaded files, unpacked models and level stores, and locks on its entries."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from evosweep.core.errors import AssetError
from evosweep.core.events import Progress

LOCK_SECONDS = 3600.0


def cache_folder(*parts: str) -> Path:
    """Return (and create) a folder of the cache: ``$EVOSWEEP_CACHE``, else the platform's cache folder.

    Raises:
        AssetError: It does not exist and cannot be created.
    """
    root = os.environ.get("EVOSWEEP_CACHE") or platformdirs.user_cache_dir("evosweep", appauthor=False)
    folder = Path(root).expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(not_writable(folder, error)) from error
    return folder


@contextmanager
def locked(path: Path, *, purpose: str, progress: Progress, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold a lock file while the body runs, so that of several processes one does the work.

    Args:
        path: The lock file; the operating system frees it when its process ends, however it ends.
        purpose: What the holder does, as in "downloading gensim".
        progress: Shows that another process is being waited for.
        seconds: How long to wait.

    Raises:
        AssetError: Another process held the lock all the time, or the lock file cannot be written.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.say(f"waiting for another process that is {purpose} (it holds {path})")
            lock.acquire(timeout=seconds)
    except Timeout as error:
        raise AssetError(
            f"another process has been {purpose} for more than {seconds:.0f} s and holds {path}; "
            "wait for it or end it, then run the same command again"
        ) from error
    except OSError as error:
        raise AssetError(not_writable(path.parent, error)) from error
    try:
        yield
    finally:
        lock.release()


def not_writable(folder: Path, error: OSError) -> str:
    """Return one line that says why ``folder`` cannot be written to, its free space, and what to do."""
    existing = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free / 1e6
    return (
        f"the cache folder {folder} cannot be written to: {error.strerror or error} ({free:.0f} MB are free there); "
        "make room or set EVOSWEEP_CACHE to another folder"
    )
