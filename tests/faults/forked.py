"""Commands as processes of their own, forked from one that has imported everything: real ones, started fast."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.cli import evosweep
from tests.faults.processes import PATIENCE

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["evosweep.cli.job", "evosweep.tracking.mlflow_tracker.tracker", "evosweep.cli.finish"])


def fork(folder: Path, *arguments: str, cache: Path, printed: str | None = None) -> ForkServerProcess:
    """Start a command in a folder.

    Args:
        folder: Where it works.
        arguments: Of the command.
        cache: Folder of its cache.
        printed: Name, beside the cache, of the files ``.out`` and ``.err`` with what it prints; None: the cache's.
    """
    process = FORKS.Process(target=_work, args=(folder, cache, printed or cache.name, arguments))
    process.start()
    return process


def killed_when(condition: Callable[[], object], process: ForkServerProcess) -> bool:
    """Kill a process, as the kernel does when memory ends, once something is true; return False if it ended before."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join(PATIENCE)
    return process.exitcode == -9


def _work(folder: Path, cache: Path, printed: str, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ["EVOSWEEP_CACHE"] = str(cache)
    sys.stdout = cache.with_name(f"{printed}.out").open("w")
    sys.stderr = cache.with_name(f"{printed}.err").open("w")
    torch.set_num_threads(1)
    sys.exit(evosweep(*arguments))
