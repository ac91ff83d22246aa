"""A lock, so that only one process builds a level store, and a message for processes that wait for it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evosweep.core.errors import StoreError
from evosweep.core.events import Progress

SILENT_SECONDS = 3.0  # a wait that is shorter is not worth a message


@contextmanager
def build_lock(target: Path, *, timeout: float, progress: Progress) -> Iterator[None]:
    """Hold the lock of a store for a while.

    A second file, next to the lock file, names the process that holds it.

    Args:
        target: Folder of the store; the lock is a file beside it.
        timeout: Seconds to wait while another process holds it.
        progress: Told which process is waited for.

    Raises:
        StoreError: Another process still holds it after ``timeout``.
        OSError: The lock file cannot be written.
    """
    lock = FileLock(target.with_suffix(".lock"))
    owner = target.with_suffix(".owner")
    silent = min(SILENT_SECONDS, timeout)
    try:
        lock.acquire(timeout=silent)
    except Timeout:
        progress.say(f"level store {target.name} is being built by {_name(owner)}; waiting for {lock.lock_file}")
        try:
            lock.acquire(timeout=timeout - silent)
        except Timeout as error:
            raise StoreError(
                f"level store {target.name} is still being built by {_name(owner)} after {timeout:g} s; end that "
                f"process if it hangs (it holds {lock.lock_file}), or raise store.lock_timeout"
            ) from error
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _name(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
