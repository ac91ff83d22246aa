"""Calibration shared out among processes gives the store that one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import TINY, write_corpus


def manifest(folder: Path, *launcher: str) -> dict:
    """Run the command line in processes of its own, with a cache of its own; return the manifest of its store."""
    cache = folder / "cache"
    environment = {**os.environ, "EVOSWEEP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *launcher,
        "-m",
        "evosweep",
        *TINY,
        "sampler=uniform",
        "drop=sublayers",
        "tracking=none",
        "export=none",
        "model.device=cpu",
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (cache / "stores").glob("*/manifest.json")
    (result,) = folder.glob("runs/evosweep/*/result.json")  # one process searched
    return {**json.loads(path.read_text()), "kl": json.loads(result.read_text())["metrics"]["kl"]}


def test_two_processes_build_what_one_builds(tmp_path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir()
        write_corpus(folder)
    one = manifest(folders["one"])
    two = manifest(folders["two"], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert one["key"] == two["key"]
    for alone, shared in zip(one["units"], two["units"], strict=True):
        # A weight on the threshold of outliers counts or does not.
        assert shared["columns"] == pytest.approx(alone["columns"], rel=1e-2, abs=2e-3)
        for here, there in zip(alone["levels"], shared["levels"], strict=True):
            assert there["cost"] == here["cost"]
            if here.get("error") is not None:
                assert there["error"] == pytest.approx(here["error"], rel=0.05)
    assert two["kl"] == pytest.approx(one["kl"], rel=0.05)
