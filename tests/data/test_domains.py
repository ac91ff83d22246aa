"""Several texts side by side, mixes, and near-duplicates across splits."""

import html
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evosweep.core.results import read_result
from evosweep.tracking.significance import found_sentences
from tests.cli import TINY, evosweep, workplace

BARE = ["tracking=none", "storage=memory", "export=none"]


def sentences(count: int, *, seed: int, letters: str) -> list[str]:
    draws = np.random.Generator(np.random.PCG64(seed))
    words = ["".join(draws.choice(list(letters), 5)) for _ in range(60)]
    return [" ".join(draws.choice(words, 80)) for _ in range(count)]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("domains")) as folder:
        write_lines(folder / "greek.jsonl", sentences(20, seed=1, letters="αβγδε"))
        write_lines(folder / "upper.jsonl", sentences(20, seed=2, letters="ABCDE"))
        yield folder


def test_two_domains_are_in_table_and_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evosweep(*TINY, *BARE, "data.validation=[greek.jsonl,upper.jsonl]", "name=two") == 0
    (path,) = folder.glob("runs/two/*/result.json")
    row = read_result(path)
    assert list(row["domains"]) == ["greek", "upper"]
    for figures in row["domains"].values():
        assert figures["tokens"] == 512 and len(figures["found"]["kl_by_window"]) == 8
        assert figures["found"]["kl"] == pytest.approx(np.mean(figures["found"]["kl_by_window"]))
        assert figures["found"]["kl"] > 0 and figures["dense"]["ppl"] > 1
        assert figures["against_uniform"]["windows"] == 8
    assert row["domains"]["greek"]["text"] != row["domains"]["upper"]["text"] != row["text"]
    shown = capsys.readouterr().out
    assert "by domain" in shown and " greek " in shown and " upper " in shown


def test_a_run_says_whether_it_beat_uniform_and_its_start(folder: Path) -> None:
    (path,) = folder.glob("runs/two/*/result.json")
    row = read_result(path)
    assert row["against"]["uniform"]["kl"] == row["against"]["start"]["kl"] == pytest.approx(row["kl"], rel=1e-5)
    assert row["against"]["uniform"]["other"] == pytest.approx(row["uniform"]["kl"], rel=1e-5)
    report = html.unescape((path.parent / "report" / "report.html").read_text(encoding="utf-8"))
    assert "By domain" in report
    sentences = found_sentences(row["sampler"], row["against"])
    assert len(sentences) == 2 and all(sentence in report for sentence in sentences)


def test_a_mix_calibrates_and_its_text_is_reported_on(folder: Path) -> None:
    others = [text for text in TINY if not text.startswith("data")]
    mixed = ["data=mix", "data.shares={corpus.jsonl: 0.75, greek.jsonl: 0.25}", "data.validation=[greek.jsonl]"]
    assert evosweep(*others, *BARE, *mixed, "tokens.validation=256", "sampler=uniform", "name=mixed") == 0
    (path,) = folder.glob("runs/mixed/*/result.json")
    assert list(read_result(path)["domains"]) == ["greek"]
    assert found_sentences("uniform", read_result(path)["against"]) == []
