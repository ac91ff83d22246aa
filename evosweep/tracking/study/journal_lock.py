"""The lock of a journal file: Optuna's own, but free at once when the process that holds it has died."""

import os
import socket
import time
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import psutil
from filelock import FileLock
from optuna.storages.journal import JournalFileOpenLock

LOCK = ".lock"  # behind the journal's name, as Optuna's locks have it: they and this one exclude each other
GRACE = 30.0  # seconds after which a lock of an unknown or distant holder is broken, as Optuna does
SHORTEST = 0.001  # seconds between two tries
LONGEST = 0.25


class OwnedLock(JournalFileOpenLock):
    """A lock file that is made exclusively and names its holder, on any file system.

    A holder on this machine that is gone (killed while it wrote) is noticed at once; Optuna's locks make everybody
    wait for half a minute then.

    Args:
        path: Of the journal.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._file = Path(path + LOCK)

    def acquire(self) -> bool:
        """Take the lock, however long that takes."""
        pause = SHORTEST
        seen = None
        since = time.monotonic()
        while True:
            try:
                handle = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                held = self._held()
                if held != seen:
                    seen = held
                    since = time.monotonic()
                if held is not None and (_is_gone(held[1]) or time.monotonic() - since > GRACE):
                    self._break(held)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)
                continue
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"{_machine()} {os.getpid()}")
            return True

    def release(self) -> None:
        """Free the lock.

        Raises:
            RuntimeError: It is not held any more.
        """
        try:
            self._file.unlink()
        except OSError as error:
            raise RuntimeError("Error: did not possess lock") from error

    def _held(self) -> tuple[int, str] | None:
        """Return when the lock was taken, and what names its holder; None where it is free."""
        try:
            return self._file.stat().st_mtime_ns, self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def _break(self, held: tuple[int, str]) -> None:
        """Free a lock unless another process has done so, and a third one has it now."""
        with suppress(OSError), FileLock(f"{self._file}.breaking"):
            if self._held() == held:
                aside = self._file.with_name(f"{self._file.name}.{uuid.uuid4()}")
                self._file.rename(aside)
                aside.unlink()


@lru_cache(maxsize=1)
def _machine() -> str:
    """Return what names the machine, or the container, in which a process number means something."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        names.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join("".join(name.split()) for name in names)


def _is_gone(holder: str) -> bool:
    """Return whether a holder is of this machine and has died."""
    machine, _, number = holder.rpartition(" ")
    if machine != _machine() or not number.isdigit():
        return False
    try:
        return bool(psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
