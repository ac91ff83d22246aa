"""Passwords of a tracking server and of a database appear in nothing that a run writes, logs or shows."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from evosweep.core.redact import redact
from evosweep.tracking.mlflow_tracker import tracker
from tests.cli import TINY, evosweep, workplace
from tests.faults.server import Proxy, Server, free_port, mlflow_server
from tests.tracking.test_database import url as database_url  # noqa: F401 - a fixture

TRACKING = "sw0rdfish"
STORAGE = "tr0ub4dor"
SEARCH = [*TINY, "search.generations=1"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "work").mkdir()
    with workplace(tmp_path / "work") as folder:
        yield folder


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def files_with_secrets(*folders: Path) -> list[Path]:
    """Return the files below folders that hold one of the passwords."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(text.encode() in path.read_bytes() for text in (TRACKING, STORAGE))]


def rows_of(address: str) -> str:
    """Return the content of all tables of a database as text."""
    engine = sqlalchemy.create_engine(address)
    known = sqlalchemy.MetaData()
    known.reflect(engine)
    with engine.connect() as connection:
        rows = [str(row) for table in known.tables.values() for row in connection.execute(table.select())]
    assert len(rows) > 10
    return "\n".join(rows)


@pytest.fixture(autouse=True)
def nothing_shown(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    said = capfd.readouterr()
    assert not [text for text in (TRACKING, STORAGE) if text in said.out + said.err]


def with_password(address: str, password: str) -> str:
    scheme, _, rest = address.partition("://")
    return f"{scheme}://me:{password}@{rest.rpartition('@')[2]}"


def test_a_run_that_works_keeps_them_out_of_all_it_leaves(
    folder: Path,
    server: Server,
    proxy: Proxy,
    database_url: str,  # noqa: F811
) -> None:
    storage = database_url.replace("evosweep@", f"evosweep:{STORAGE}@")
    settings = [f"tracking.uri={with_password(proxy.uri, TRACKING)}", "storage=database", f"storage.url={storage}"]
    assert evosweep(*SEARCH, *settings, "name=works", "tracking.model=weights") == 0
    assert evosweep("-m", *SEARCH, *settings, "name=many", "sampler=uniform", "seed=0,1") == 0
    assert files_with_secrets(folder, server.folder) == []
    assert (folder / "runs" / "works").is_dir() and (server.folder / "kept").is_dir()
    kept = rows_of(database_url)
    assert TRACKING not in kept and STORAGE not in kept
    with sqlite3.connect(server.folder / "server.db") as tracked:  # not in its journal either
        assert not [line for line in tracked.iterdump() if TRACKING in line or STORAGE in line]


def test_a_run_that_cannot_deliver_keeps_them_out_of_its_spool(folder: Path, proxy: Proxy, monkeypatch) -> None:
    monkeypatch.setattr(tracker, "LAST", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password(proxy.uri, TRACKING))
    proxy.mode = 500
    assert evosweep(*SEARCH, "name=spooled", "sampler=uniform") == 2
    assert list(folder.rglob("tracking_unsent.jsonl"))
    assert files_with_secrets(folder) == []


@pytest.mark.parametrize(
    "settings",
    [
        ["storage=database", "storage.url=postgresql+psycopg://me:{storage}@127.0.0.1:{port}/x"],
        ["storage=database", "storage.url='postgresql+psycopg://127.0.0.1:{port}/x?user=me&password={storage}'"],
        ["storage=database", "storage.url=nosuch://me:{storage}@127.0.0.1/x"],
        ["tracking.uri=nosuch://me:{tracking}@127.0.0.1/x"],
    ],
    ids=["silent database", "password in the query", "no such database", "no such store"],
)
def test_an_error_line_is_without_them(folder: Path, settings: list[str], capfd) -> None:
    filled = [text.format(storage=STORAGE, tracking=TRACKING, port=free_port()) for text in settings]
    assert evosweep(*SEARCH, "name=fails", "sampler=uniform", *filled) == 2
    said = capfd.readouterr().err
    assert said.startswith("error:") and said.count("\n") == 1
    assert not [text for text in (TRACKING, STORAGE) if text in said]
    assert files_with_secrets(folder) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("got https://me:s3cret@host:1/x?a=b", "got https://me:***@host:1/x?a=b"),
        ("postgresql://me:p@ss@host/x", "postgresql://me:***@host/x"),
        ("uri=http\\://me\\:s3cret@host\\:1/x", "uri=http\\://me:***@host\\:1/x"),
        ("https://t0ken@host", "https://***@host"),
        (
            "postgresql://host/x?user=me&password=s3cret&sslmode=off",
            "postgresql://host/x?user=me&password=***&sslmode=off",
        ),
        ("tokens=3 and model.layers.0", "tokens=3 and model.layers.0"),
    ],
)
def test_what_is_left_of_an_address(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "${oc.env:HOME}/out"])
def test_a_name_does_not_lead_out_of_the_folder(folder: Path, name: str, capfd) -> None:
    before = set(folder.parent.rglob("*"))
    assert evosweep(*SEARCH, f"name='{name}'", "sampler=uniform", "tracking=none") == 2
    assert "name must be" in capfd.readouterr().err
    assert set(folder.parent.rglob("*")) == before
