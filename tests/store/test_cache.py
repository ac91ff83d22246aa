"""Caches that are shared, full, read-only or no folders."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from evosweep.assets import locks
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import AssetError, SettingError, StoreError
from evosweep.store.build import StoreBuilder, megabytes
from evosweep.store.store_plan import plan_store
from tests.store.test_store import Heard

NOBODY = 65534
HOLD = """
import sys, time
from pathlib import Path
from evosweep.core.events import Silent
from evosweep.core.errors import StoreError
from evosweep.assets.locks import locked
with locked(Path(sys.argv[1]), purpose="building", timeout=0, progress=Silent(), error=StoreError, hint=""):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def plan(anatomy):
    return plan_store(anatomy, RoundToNearest(bits=[2, 4], group=16))


@pytest.fixture
def cache(monkeypatch):
    """A folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("EVOSWEEP_CACHE", name)
        yield Path(name)


@contextmanager
def read_only(folder: Path):
    """Make a tree read-only, and be somebody whom that stops."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@contextmanager
def held(target: Path, seconds: float):
    """Let another process hold the lock of a store."""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(target), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_read_only_cache_serves_the_store_that_it_has(plan, splits, cache) -> None:
    first = StoreBuilder().open(plan, splits["calibration"], model_name="t")
    heard = Heard()
    with read_only(cache):
        again = StoreBuilder().open(plan, splits["calibration"], model_name="t", progress=heard)
    assert again.key == first.key and "found" in heard.lines[-1]


def test_a_read_only_cache_without_the_store_is_one_line(plan, splits, cache) -> None:
    (cache / "stores").mkdir()
    with (
        read_only(cache),
        pytest.raises(StoreError, match=r"cannot be written to: Permission denied .*EVOSWEEP_CACHE") as caught,
    ):
        StoreBuilder().open(plan, splits["calibration"], model_name="t")
    assert "\n" not in str(caught.value)


def test_a_cache_that_is_no_folder_is_one_line(plan, splits, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"file/stores cannot be written to.*EVOSWEEP_CACHE"):
        StoreBuilder().open(plan, splits["calibration"], model_name="t")


def test_a_disk_that_is_full_while_writing_is_one_line_and_leaves_nothing(plan, splits, cache, monkeypatch) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot be written.*EVOSWEEP_CACHE"):
            StoreBuilder().open(plan, splits["calibration"], model_name="t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not [path for path in (cache / "stores").iterdir() if path.is_dir()]
    assert StoreBuilder().open(plan, splits["calibration"], model_name="t").units


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 MB"), (1000, "0.001 MB"), (19_300, "0.0193 MB"), (4_200_000, "4.2 MB"), (10**10, "10000 MB")],
)
def test_sizes_are_never_rounded_to_nothing(size: int, text: str) -> None:
    assert megabytes(size) == text


def test_a_wait_for_another_process_is_said_and_ends_in_one_line(plan, splits, cache, monkeypatch) -> None:
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.2)
    store = StoreBuilder().open(plan, splits["calibration"], model_name="t")
    target = store.folder.rename(cache / "elsewhere") and store.folder
    heard = Heard()
    with held(target, 60) as process:
        began = time.monotonic()
        with pytest.raises(
            StoreError, match=rf"process {process.pid} on .* is still building level store .* after 0.5 s.*lock_timeout"
        ):
            StoreBuilder(lock_timeout=0.5).open(plan, splits["calibration"], model_name="t", progress=heard)
        assert 0.4 < time.monotonic() - began < 5
    assert f"waiting for process {process.pid} on" in heard.lines[0] and f"{target.name}.lock" in heard.lines[0]


def test_a_store_is_built_once_the_other_process_is_gone(plan, splits, cache) -> None:
    key = StoreBuilder().open(plan, splits["calibration"], model_name="t").folder
    key.rename(cache / "elsewhere")
    heard = Heard()
    with held(key, 1):
        StoreBuilder().open(plan, splits["calibration"], model_name="t", progress=heard)
    assert heard.lines and "built" in heard.lines[-1] and not key.with_suffix(".owner").exists()


def test_a_store_that_is_there_is_read_while_the_lock_is_held(plan, splits, cache) -> None:
    store = StoreBuilder().open(plan, splits["calibration"], model_name="t")
    with held(store.folder, 60):
        assert StoreBuilder(lock_timeout=0).open(plan, splits["calibration"], model_name="t").key == store.key


@pytest.mark.parametrize("settings", [{"lock_timeout": -1}, {"lock_timeout": "soon"}, {"layer_errors": 1}])
def test_bad_settings_are_named(settings: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        StoreBuilder(**settings)
