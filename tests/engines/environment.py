"""Finds an engine's interpreter, and runs a script in it that prints one JSON object."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

REQUIREMENTS = Path(__file__).with_name("requirements")
SCRIPTS = Path(__file__).parent
CACHE = os.environ.get("EVOSWEEP_CACHE") or platformdirs.user_cache_dir("evosweep")  # read before tests set their own


def engine_folder(name: str) -> Path:
    """Returns where an engine's virtual environment is: one for each text of its requirements and Python version."""
    pins = (REQUIREMENTS / f"{name}.txt").read_bytes()
    digest = hashlib.sha256(pins + sys.version.encode()).hexdigest()[:12]
    return Path(CACHE) / "engines" / f"{name}-{digest}"


def engine_python(name: str) -> Path:
    """Returns an engine's interpreter; skips the test, with the line that installs it, where there is none."""
    python = engine_folder(name) / "bin" / "python"
    if not (engine_folder(name) / "ready").is_file():
        pytest.skip(f"{name} is not installed: make engines")
    return python


def run_engine(name: str, script: str, *arguments: object, timeout: float = 600) -> dict:
    """Runs tests/engines/<script>.py in an engine's environment; returns the JSON of the last line that it prints."""
    command = [engine_python(name), SCRIPTS / f"{script}.py", *arguments]
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{script} failed in {name}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
