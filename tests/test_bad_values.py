"""Every value that was seen to end badly, and more of every group: one line, exit code 2, nothing left behind."""

from pathlib import Path

import pytest

from tests.bad_values import BAD
from tests.cli import TINY, evosweep, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bad")
    write_corpus(folder)
    return folder


@pytest.mark.parametrize(("arguments", "begins"), BAD, ids=[" ".join(each)[:60] for each, _ in BAD])
def test_a_bad_value_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], begins: str
) -> None:
    monkeypatch.chdir(place)
    before = sorted(path.name for path in [*place.iterdir(), *place.parent.iterdir()])
    assert evosweep(*TINY, "tracking=none", "export=none", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {begins}"), line
    assert len(line) < 420
    assert sorted(path.name for path in [*place.iterdir(), *place.parent.iterdir()]) == before


def test_there_are_bad_values_of_every_group() -> None:
    groups = "model data compressor drop budget sampler fitness search storage tracking report export tokens store"
    typed = " ".join(argument for arguments, _ in BAD for argument in arguments)
    assert len(BAD) > 120
    assert all(f"{group}." in typed for group in [*groups.split(), "evaluate", "hydra"])
