"""The package as it is installed: a wheel that carries conf/ and works outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.cli import TINY, write_corpus

ROOT = Path(__file__).parent.parent


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "evosweep" / "conf" / "config.yaml").is_file()

    home = tmp_path / "elsewhere"
    home.mkdir()
    write_corpus(home)
    environment = {**os.environ, "PYTHONPATH": str(site), "EVOSWEEP_CACHE": str(tmp_path / "cache")}
    arguments = [*TINY, "sampler=uniform", "tracking=none", "export=none"]
    done = subprocess.run(
        [sys.executable, "-m", "evosweep", *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "uniform" in done.stdout

    mine = home / "my_conf" / "experiment" / "mine.yaml"  # an experiment of the user's own, beside those in the wheel
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndefaults:\n  - override /sampler: ilp\nname: mine\nseed: 7\n")
    own = [
        "--config-dir",
        "my_conf",
        "+experiment=mine",
        *TINY,
        "tracking=none",
        "export=none",
        "hydra.verbose=[evosweep]",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "evosweep", *own],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ilp" in done.stdout and (home / "studies" / "mine.journal").is_file()
    assert "evosweep.workbench DEBUG: store: " in done.stderr and "tokens at once" in done.stderr
    assert (site / "hydra_plugins" / "evosweep_tuner.py").is_file()
    shown = subprocess.run(
        [sys.executable, "-c", "import evosweep; print(evosweep.__file__)"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(site) in shown.stdout
