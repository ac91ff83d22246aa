"""Processes that share calibration, scoring and measurements give what one process gives, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.shared import _assembled, _computed, shares
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from tests.cli import TINY, evosweep, workplace
from tests.faults.processes import only_run, outcome

RUN = [*TINY, "tracking=none", "export=none", "report=none", "model.device=cpu", "drop=sublayers"]
PATIENCE = 120.0


def torchrun(folder: Path, processes: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command in several processes."""
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "evosweep"]
    return start(folder, *program, *arguments, **environment)


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python in a folder, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and the errors of a process, once it has ended."""
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a search by one process, with its corpus and cache."""
    with workplace(tmp_path_factory.mktemp("alone")) as folder:
        assert evosweep(*RUN, "name=one", "sampler=evopress_ilp_scaled", "search.racing=0.2") == 0
    return folder


def manifest(cache: Path) -> dict:
    (path,) = (cache / "stores").glob("*/manifest.json")
    return json.loads(path.read_text())


def test_two_processes_find_what_one_finds(alone: Path) -> None:
    cache = str(alone / "cache")
    for column in (alone / "cache" / "columns").iterdir():
        column.unlink()  # measured again, by both
    code, errors = finished(
        torchrun(
            alone, 2, *RUN, "name=two", "sampler=evopress_ilp_scaled", "search.racing=0.2", EVOSWEEP_CACHE=cache
        )
    )
    assert code == 0, errors
    assert outcome(only_run(alone, "two")) == outcome(only_run(alone, "one"))
