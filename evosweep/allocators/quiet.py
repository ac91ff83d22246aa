"""Discards what native libraries print."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1


@contextmanager
def silenced_stdout() -> Iterator[None]:
    """Discard what native code prints to standard output inside the body; HiGHS has lines that no option turns off."""
    sys.stdout.flush()
    c_library = ctypes.CDLL(None)
    c_library.fflush(None)
    saved = os.dup(STDOUT)
    discard = os.open(os.devnull, os.O_WRONLY)
    os.dup2(discard, STDOUT)
    try:
        yield
    finally:
        c_library.fflush(None)  # what is still in C's own buffer must not appear later
        os.dup2(saved, STDOUT)
        os.close(saved)
        os.close(discard)
