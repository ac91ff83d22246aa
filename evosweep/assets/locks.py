"""A lock on a file of the cache, so that of several processes only one downloads or builds it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress

SILENT_SECONDS = 3.0  # a wait that is shorter is not worth a message


@contextmanager
def locked(
    target: Path, *, purpose: str, timeout: float, progress: Progress, error: type[EvosweepError], hint: str
) -> Iterator[None]:
    """Hold the lock of a file or folder while the body runs.

    The lock is a file beside the target; the operating system frees it when its process ends, however it ends. A
    second file, ``.owner``, names the process that holds it.

    Args:
        target: What only one process may make.
        purpose: What the holder does, as in "downloading gensim".
        timeout: Seconds to wait while another process holds the lock.
        progress: Shows which process is waited for.
        error: Raised after ``timeout``.
        hint: What else the user can do then, as in "or raise store.lock_timeout".

    Raises:
        EvosweepError: ``error``; another process still holds the lock after ``timeout``.
        OSError: The lock file cannot be written.
    """
    lock = FileLock(target.with_suffix(".lock"))
    owner = target.with_suffix(".owner")
    silent = min(SILENT_SECONDS, timeout)
    try:
        lock.acquire(timeout=silent)
    except Timeout:
        progress.say(f"waiting for {_name(owner)}, which is {purpose} (it holds {lock.lock_file})")
        try:
            lock.acquire(timeout=timeout - silent)
        except Timeout as late:
            raise error(
                f"{_name(owner)} is still {purpose} after {timeout:g} s and holds {lock.lock_file}; end it if it "
                f"hangs, {hint}"
            ) from late
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _name(owner: Path) -> str:
    """Return what the owner's file says, or ``another process`` where there is none."""
    try:
        return owner.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
