"""Images with captions on the command line: calibrated and scored on, exported, refused in one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evosweep.core.results import read_result
from evosweep.models.load import byte_tokenizer
from tests.cli import evosweep, workplace
from tests.data.test_images import draw
from tests.models.seeing import save_seeing

OURS = [
    "model=hf",
    "model.dtype=float32",
    "model.device=cpu",
    "data=images",
    "data.path=images",
    "tokens.seq_len=32",
    "tokens.calibration=192",
    "tokens.validation=96",
    "tokens.shares={validation: 0.25, search: 0.25, calibration: 0.5}",
    "compressor.bits=[2,3,4]",
    "compressor.group=32",
    "search.generations=2",
    "search.offspring=4",
    "search.stages=[{survivors:2,tokens:32},{survivors:1,tokens:64}]",
    "tracking=none",
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("images")) as folder:
        draw(folder / "images")
        save_seeing("llava", folder / "llava")
        yield folder


def test_a_search_on_images_is_exported_and_scored_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evosweep(*OURS, "model.path=llava", "name=seen", "data.validation=[corpus.jsonl]") == 0
    (result,) = (here / "runs" / "seen").glob("*/result.json")
    row = read_result(result)
    assert row["export"]["max_logit_difference"] < 1e-4
    assert (result.parent / "model" / "processor_config.json").is_file()
    capsys.readouterr()
    assert evosweep("score", str(result.parent)) == 0
    assert f'"kl": {row["kl"]}' in capsys.readouterr().out
    blind = ["data=text", "data.path=corpus.jsonl", "tokens.shares={validation: 0.1, search: 0.1, calibration: 0.8}"]
    assert evosweep("score", str(result.parent), *blind) == 0
    assert f'"kl": {row["kl"]}' not in capsys.readouterr().out


def test_a_winner_is_finished_on_images_and_scored_on_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(here / "others", 12)
    settings = ["finish=bias_tuning", "finish.steps=2", "report=none", "export=none"]
    assert evosweep(*OURS, "model.path=llava", "name=finished", *settings) == 0
    (result,) = (here / "runs" / "finished").glob("*/result.json")
    assert read_result(result)["finish"]["kl_before"] > 0
    capsys.readouterr()
    smaller = ["tokens.calibration=32", "tokens.validation=64", "tokens.seq_len=16"]
    assert evosweep("score", str(result.parent), "data.path=others", *smaller) == 0
    assert '"tokens": 64' in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["fisher", "hawq_v2"])
def test_what_is_measured_on_the_whole_model_is_measured_on_images(here: Path, sampler: str) -> None:
    settings = ["evaluate.sensitivity_tokens=64", "search.generations=0", "report=none", "export=none"]
    assert evosweep(*OURS, "model.path=llava", f"name={sampler}", f"sampler={sampler}", *settings) == 0


def refused(here: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """Run a command that is refused; return its one line."""
    capsys.readouterr()
    assert evosweep(*OURS, "name=refused", *settings) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert not (here / "runs" / "refused").exists()
    return line


def test_what_images_do_not_fit_is_one_line_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(here, capsys, "model=tiny")
    assert "data=images needs a model of images and text (model.kind=vision_language): " in text
    assert "reads text alone" in text
    save_seeing("llava", here / "bare")
    (here / "bare" / "processor_config.json").unlink()
    byte_tokenizer().save_pretrained(here / "bare")
    assert "needs the model's processor, and the checkpoint bare has none that loads" in refused(
        here, capsys, "model.path=bare"
    )
    assert "there is no imagse (did you mean 'images'?)" in refused(
        here, capsys, "model.path=llava", "data.path=imagse"
    )
