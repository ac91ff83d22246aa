"""The compressor of CONTRIBUTING.md works from outside of the package, by its YAML alone."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from tests.cli import TINY, evosweep, workplace
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's folder with the module and the YAML as the page shows them."""
    with workplace(tmp_path) as folder:
        module = folder / "my_package" / "thin.py"
        module.parent.mkdir()
        (module.parent / "__init__.py").touch()
        module.write_text(next(text for text in blocks(PAGE, "python") if "class LowRank" in text))
        choice = folder / "my_conf" / "compressor" / "thin.yaml"
        choice.parent.mkdir(parents=True)
        choice.write_text(blocks(PAGE, "yaml")[0])
        monkeypatch.syspath_prepend(str(folder))
        yield folder
        for name in ("my_package", "my_package.thin"):
            sys.modules.pop(name, None)


def test_its_command_gives_a_model_of_low_rank_layers(folder: Path) -> None:
    (command,) = [line for text in blocks(PAGE, "sh") for line in text.splitlines() if "compressor=thin" in line]
    arguments = command.removeprefix("python -m evosweep ").split()
    assert evosweep(*arguments, *TINY, "tracking=none") == 0
    (run,) = [path.parent for path in folder.glob("runs/*/*/result.json")]
    row = json.loads((run / "result.json").read_text())["metrics"]
    assert row["bits_per_weight"] <= 6 and row["kl"] > 0
    levels = set(json.loads((run / "allocation.json").read_text())["allocation"].values())
    assert levels and all(re.fullmatch(r"rank(4|8|16)", level) for level in levels)


def test_a_bad_setting_of_it_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-dir", "my_conf", "compressor=thin", "compressor.ranks=[0]", *TINY, "tracking=none"]
    assert evosweep(*arguments) == 2
    assert capsys.readouterr().err.startswith("error: compressor.ranks must be")


def test_it_passes_the_suite_that_the_page_names(folder: Path) -> None:
    suite = next(text for text in blocks(PAGE, "python") if "class TestLowRank" in text)
    (folder / "test_mine.py").write_text(suite)
    importlib.invalidate_caches()
    assert (
        pytest.main(
            ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(folder), str(folder / "test_mine.py")]
        )
        == 0
    )
