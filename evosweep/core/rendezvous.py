"""Reads from the environment how many processes a command has, where they meet, and how long one waits for another."""

import os

from evosweep.core.errors import EvosweepError, SettingError

TIMEOUT = "EVOSWEEP_RANKS_TIMEOUT"  # environment: seconds that a process waits for what another one owes it
DEFAULT_TIMEOUT = 1800.0
LONGEST = 365 * 24 * 3600.0
NAMES = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun, beside WORLD_SIZE
HOW = "start with torchrun --nproc-per-node N -m evosweep ..., or unset WORLD_SIZE"


def processes() -> int:
    """Return how many processes the environment asks for."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.strip().isdecimal() or int(text) < 1:
        raise EvosweepError(f"WORLD_SIZE must be a number of processes, got {text!r}: {HOW}")
    return int(text)


def meeting_point() -> str:
    """Return the address where the processes meet; raise EvosweepError where the environment has none."""
    missing = [name for name in NAMES if not os.environ.get(name)]
    if missing:
        raise EvosweepError(f"WORLD_SIZE={processes()} is set and {' and '.join(missing)} not: {HOW}")
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def local_rank(devices: int) -> int:
    """Return which of a host's devices belongs to this process."""
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdecimal() or int(text) >= devices:
        raise EvosweepError(f"LOCAL_RANK must be below the {devices} CUDA devices of this host, got {text!r}: {HOW}")
    return int(text)


def on_this_host(count: int) -> int:
    """Return how many of ``count`` processes run on this host, and so share its memory; torchrun says so."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(text), count) if text.isdecimal() and int(text) > 0 else count


def timeout() -> float:
    """Return how long a process waits for another, in seconds."""
    text = os.environ.get(TIMEOUT) or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < LONGEST:
        raise SettingError(f"environment variable {TIMEOUT}", allowed="a number of seconds above 0", got=text)
    return seconds
