"""Says in one line that a disk could not be written, and how to go on once there is room."""

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError

from evosweep.cli.find import CONFIG
from evosweep.cli.launch import MULTIRUN
from evosweep.core.errors import EvosweepError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_NUMBER = re.compile(r"os error (\d+)")


def disk_error(error: OSError | SafetensorError, folder: Path | None = None) -> EvosweepError | None:
    """Return a one-line error for a disk that is full or not writable, or None for any other error.

    Args:
        error: As raised by Python, or by safetensors, which names the system's number in its text.
        folder: Of the run that ended by it, if one did.
    """
    found = _NUMBER.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in (*FULL, *CLOSED):
        return None
    name = getattr(error, "filename", None)
    what = f"{name}: {os.strerror(number)}" if name else f"a file could not be written: {os.strerror(number)}"
    remedy = "make room" if number in FULL else "make it writable"
    return EvosweepError(f"{what}; {remedy}, then go on with {_how(folder)}")


def _how(folder: Path | None) -> str:
    if folder is None or not (folder / CONFIG).is_file():
        return "the same command"
    return "the same command and resume=auto" if MULTIRUN in os.environ else f"evosweep resume {folder}"
