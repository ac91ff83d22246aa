"""Tables of the results book are made again from their configurations, and no more of them than was asked."""

import sys
from pathlib import Path

import pytest

from benchmarks import results, shown

ROOT = Path(__file__).parents[1]
TABLE = """title: Two lines
machine: cpu
commands:
  - -c "print('| a |'); print('|---|'); print('| 1 |'); open('ran', 'a').write('x')"
show: output
"""


@pytest.fixture
def book(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (in_tmp / "tables").mkdir()
    (in_tmp / "tables" / "first.yaml").write_text(TABLE)
    (in_tmp / "tables" / "second.yaml").write_text(TABLE.replace("Two lines", "Others").replace("cpu", "gpu"))
    for name, path in (("TABLES", "tables"), ("BOOK", "book"), ("FIGURES", "figures"), ("PAGE", "book.md")):
        monkeypatch.setattr(results, name, in_tmp / path)
    return in_tmp


def make(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["results", *arguments])
    results.main()


def test_a_table_is_made_once_and_again_when_asked(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, "--machine", "cpu")
    make(monkeypatch, "--machine", "cpu")
    assert (book / "ran").read_text() == "x" and not (book / "book" / "second.md").exists()
    page = (book / "book.md").read_text()
    assert "## Two lines" in page and "| 1 |" in page and "commit " in page and "torch " in page
    make(monkeypatch, "--only", "first", "--again")
    assert (book / "ran").read_text() == "xx"
    (book / "tables" / "first.yaml").write_text(TABLE.replace("| 1 |", "| 2 |"))
    make(monkeypatch, "--only", "second")
    make(monkeypatch, "--only", "first")
    page = (book / "book.md").read_text()
    assert (book / "ran").read_text() == "xxxx" and "| 2 |" in page and "## Others" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "frist"], "there is no table 'frist' .did you mean 'first'"),
        ([], "say which tables"),
    ],
)
def test_what_is_not_there_is_said(
    book: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        make(monkeypatch, *arguments)


def test_a_command_that_fails_is_said(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (book / "tables" / "first.yaml").write_text(TABLE.replace("print('| a |')", "raise SystemExit('no model')"))
    with pytest.raises(SystemExit, match="ended with 1: no model"):
        make(monkeypatch, "--only", "first")


def test_all_tables_are_readable_and_their_scripts_are_there() -> None:
    tables = {path.stem: results.read_table(path) for path in sorted(results.TABLES.glob("*.yaml"))}
    assert {table["machine"] for table in tables.values()} == {"cpu", "gpu"}
    for table in tables.values():
        for command in table["commands"]:
            assert command.startswith("evosweep ") or (ROOT / command.split()[0]).is_file()


def result(sampler: str, seed: int, kl: list[float], *, budget: str = "as_uniform=3", size: float = 100.0) -> dict:
    mean = sum(kl) / len(kl)
    answers = {"accuracy": 0.5, "stderr": 0.03}
    return {
        "run": f"tiny {sampler} {budget} s{seed}",
        "sampler": sampler,
        "seed": seed,
        "budget": budget,
        "overrides": [],
        "bits_per_weight": 3.3,
        "size_mb": size,
        "kl": mean,
        "ppl": 20.0,
        "tokens": 100,
        "seconds": 1.0,
        "history": [{"tokens": 1, "kl": mean, "ppl": 20.0}],
        "text": "t",
        "kl_by_window": kl,
        "dense_ppl": 16.0,
        "dense_size_mb": 269.1,
        "domains": {"code": {"dense": {"ppl": 9.0}, "found": {"kl": mean, "ppl": 11.0, "kl_by_window": kl}}},
        "tasks": {"piqa": {"dense": answers, "found": answers}, "sciq": {"dense": answers, "found": answers}},
    }


ROWS = [
    result("uniform", 0, [0.50, 0.60, 0.71, 0.80]),
    result("evopress", 0, [0.40, 0.51, 0.60, 0.70]),
    result("evopress", 1, [0.41, 0.50, 0.62, 0.72]),
    result("ilp", 0, [0.60, 0.50, 0.65, 0.85]),
    result("uniform", 0, [0.10, 0.20, 0.30, 0.40], budget="as_uniform=4", size=114.0),
]


def test_what_is_beyond_noise_is_bold() -> None:
    lines = shown.sizes(ROWS, []).splitlines()
    (found,) = [line for line in lines if "| evopress |" in line]
    figures = "**0.5575** / 20.00 | **0.5575** / 11.00 | 50.0 ± 2.1"
    assert found == f"| tiny | as_uniform=3 | evopress | 2 | 100.0 | {figures} |"
    assert "**" not in next(line for line in lines if "| ilp |" in line)
    assert "| tiny |  | dense |  | 269.1 | 0 / 16.00 | 0 / 9.00 | 50.0 ± 2.1 |" in lines


def test_figures_are_drawn_light_and_dark(tmp_path: Path) -> None:
    made = shown.drawn(ROWS, ["standings", "size_quality"], tmp_path, name="main")
    assert [tone for tone, _ in made] == ["light", "dark"] * 2
    contents = [(tmp_path / name).read_bytes() for _, name in made]
    assert len(set(contents)) == 4 and all(content.startswith(b"\x89PNG") for content in contents)
