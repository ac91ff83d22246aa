"""Studies in a real PostgreSQL server, opened by several processes at once."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from evosweep.core.errors import SettingError
from evosweep.tracking.study.database import Database

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []
WORKERS = 4
OPEN = """
import sys, optuna
from evosweep.tracking.study.database import Database
sys.stdin.readline()
storage = Database(url=sys.argv[1], artifacts=None).open()
optuna.create_study(storage=storage, study_name=sys.argv[2])
"""


def as_postgres(*command: str) -> None:
    """Run a program of PostgreSQL, which refuses to run as root."""
    before = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run([*before, *command], check=True, capture_output=True, cwd="/tmp")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server with an empty database of its own."""
    if not BINARIES or (os.geteuid() == 0 and shutil.which("runuser") is None):
        pytest.skip("no PostgreSQL server is installed")
    binaries = BINARIES[-1]
    data = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    if os.geteuid() == 0:
        shutil.chown(data, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    as_postgres(str(binaries / "initdb"), "-D", str(data), "-U", "evosweep", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {data} -c fsync=off"
    control = str(binaries / "pg_ctl")
    as_postgres(control, "-D", str(data), "-w", "-o", options, "-l", str(data / "log"), "start")
    try:
        yield f"postgresql+psycopg://evosweep@127.0.0.1:{port}/postgres"
    finally:
        as_postgres(control, "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(data, ignore_errors=True)


def test_workers_that_find_an_empty_database_at_once_all_open_it(url: str) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, url, f"study {number}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(WORKERS)
    ]
    ended = [worker.communicate("go\n", timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, [error[-500:] for _, error in ended]
    names = optuna.get_all_study_names(Database(url=url).open())
    assert sorted(names) == [f"study {number}" for number in range(WORKERS)]


def test_a_server_that_is_not_there_is_one_line_without_the_password() -> None:
    with pytest.raises(SettingError, match="url must be the URL of a database that answers") as error:
        Database(url="postgresql+psycopg://me:secret@127.0.0.1:9/none").open()
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("url", [5, "", "studies.db"])
def test_what_is_no_url_is_refused(url: object) -> None:
    with pytest.raises(SettingError, match="url must be a database URL"):
        Database(url=url)  # type: ignore[arg-type]
