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


def fork(folder: Path, *arguments: str, cache: Path) -> ForkServerProcess:
    """Start a command in a folder, with this cache; what it prints goes to ``<cache>.out`` and ``.err`` beside it."""
    process = FORKS.Process(target=_work, args=(folder, cache, arguments))
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


def _work(folder: Path, cache: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ["EVOSWEEP_CACHE"] = str(cache)
    sys.stdout = cache.with_suffix(".out").open("w")
    sys.stderr = cache.with_suffix(".err").open("w")
    torch.set_num_threads(1)
    sys.exit(evosweep(*arguments))
