"""Tables of the results book are made again from their configurations, and no more of them than was asked."""

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import results, shown
from tests.cli import TINY, write_corpus

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
    (in_tmp / "book.md").write_text(f"# Results\n\n{results.BEGIN}\nan earlier table\n{results.END}\n\nby hand\n")
    return in_tmp


def make(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["results", *arguments])
    results.main()


def test_a_table_is_made_once_and_again_when_asked(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, "--machine", "cpu")
    make(monkeypatch, "--machine", "cpu")
    assert (book / "ran").read_text() == "x" and not (book / "book" / "second.md").exists()
    page = (book / "book.md").read_text()
    assert "### Two lines" in page and "| 1 |" in page and "commit " in page and "torch " in page
    assert page.startswith("# Results\n") and page.endswith("\n\nby hand\n") and "an earlier table" not in page
    make(monkeypatch, "--only", "first", "--again")
    assert (book / "ran").read_text() == "xx"
    (book / "tables" / "first.yaml").write_text(TABLE.replace("| 1 |", "| 2 |"))
    make(monkeypatch, "--only", "second")
    make(monkeypatch, "--only", "first")
    page = (book / "book.md").read_text()
    assert (book / "ran").read_text() == "xxxx" and "| 2 |" in page and "### Others" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "frist"], "there is no table 'frist' .did you mean 'first'"),
        ([], "say which tables"),
        (["--from", "elsewhere", "--machine", "gpu"], "--from needs the name of the one table"),
        (["--from", "elsewhere", "--only", "first"], "there is neither a result.json nor an output.txt in elsewhere"),
    ],
)
def test_what_is_not_there_is_said(
    book: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        make(monkeypatch, *arguments)


def test_a_page_without_a_part_for_tables_is_left_alone(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (book / "book.md").write_text("# By hand\n")
    with pytest.raises(SystemExit, match="tables stand between them"):
        make(monkeypatch, "--draw")
    assert (book / "book.md").read_text() == "# By hand\n"


def test_a_command_that_fails_is_said(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (book / "tables" / "first.yaml").write_text(TABLE.replace("print('| a |')", "raise SystemExit('no model')"))
    with pytest.raises(SystemExit, match="ended with 1: no model"):
        make(monkeypatch, "--only", "first")


def test_all_tables_are_readable_and_their_scripts_are_there() -> None:
    tables = {path.stem: results.read_table(path) for path in sorted(results.TABLES.glob("*.yaml"))}
    assert {table["machine"] for table in tables.values()} == {"cpu", "gpu"}
    for table in tables.values():
        assert set(table.get("rows", ())) <= set(tables)
        for command in results.commands_of(table):
            assert "{" not in command and "}" not in command
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
    (found,) = [line for line in lines if "| evopress |" in line and "/" in line]
    figures = "**0.5575** ± 0.0071 / 20.00 | **0.5575** ± 0.0071 / 11.00 | 50.0 ± 2.1 | 1 |"
    assert found == f"| tiny | as_uniform=3 | evopress | 2 | 100.0 | {figures}"
    assert "**" not in next(line for line in lines if "| ilp |" in line)
    assert "| tiny |  | dense |  | 269.1 | 0 / 16.00 | 0 / 9.00 | 50.0 ± 2.1 |  |" in lines
    assert "| tiny | as_uniform=3 | evopress | 50.0 ± 3.0 | 50.0 ± 3.0 |" in lines


def test_models_are_not_compared_with_one_another() -> None:
    other = [{**row, "run": row["run"].replace("tiny", "large"), "kl_by_window": [0.1, 0.1, 0.2, 0.2]} for row in ROWS]
    lines = shown.sizes([*ROWS, other[1], other[2]], []).splitlines()
    assert "| large | as_uniform=3 | evopress | 2 | 100.0 | 0.5575 ± 0.0071 / 20.00 |" in "\n".join(lines)


def test_a_winner_is_named_beyond_noise_alone() -> None:
    found = [
        *(result("evopress", seed, [value] * 2) for seed, value in enumerate((0.50, 0.51, 0.52))),
        *(result("trust_region", seed, [value] * 2) for seed, value in enumerate((0.51, 0.52, 0.51))),
        *(result("ilp", seed, [value] * 2) for seed, value in enumerate((0.70, 0.71, 0.72))),
        *(result("ilp", seed, [value] * 2, budget="as_uniform=4") for seed, value in enumerate((0.10, 0.11, 0.12))),
        *(result("owl", seed, [value] * 2, budget="as_uniform=4") for seed, value in enumerate((0.20, 0.21, 0.22))),
    ]
    lines = shown.seeds([*found, found[0]], []).splitlines()
    assert "- as_uniform=3: no winner; evopress, trust_region are within noise of the best mean." in lines
    assert "- as_uniform=4: ilp is ahead of every other sampler." in lines
    assert any(line.startswith("| as_uniform=3 | evopress | 3 | 3.300 | 0.5100 ± 0.0100 | 20.00") for line in lines)


def test_every_combination_is_a_command() -> None:
    table = {"commands": ["a {x} {y}"], "each": {"x": [1, 2], "y": ["b"]}}
    assert results.commands_of(table) == ["a 1 b", "a 2 b"] and results.commands_of({"commands": ["{x}"]}) == ["{x}"]


MULTIRUN = """title: Elsewhere
machine: cpu
each:
  seed: [0, 1]
commands:
  - evosweep -m SETTINGS data.validation=[code] sampler=uniform,ilp,evopress seed={seed}
show: sizes
figures: [standings]
"""


def test_runs_brought_back_from_elsewhere_are_a_table(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(book)
    settings = " ".join(f"'{setting}'" for setting in TINY)
    (book / "tables" / "third.yaml").write_text(MULTIRUN.replace("SETTINGS", settings))
    make(monkeypatch, "--only", "third", "--jobs", "2")
    shutil.move(book / "results" / "third", book / "brought")
    whole = (book / "book" / "third.md").read_text()
    (book / "brought" / "1" / "done.json").unlink()
    shutil.rmtree(book / "brought" / "1" / "2")
    make(monkeypatch, "--only", "third", "--from", "brought")
    part = (book / "book" / "third.md").read_text()
    for text, seeds, over in ((whole, 2, ""), (part, 1, "; 1 of 2 commands over")):
        (line,) = [line for line in text.splitlines() if "| evopress |" in line]
        assert line.startswith(f"| tiny | as_uniform=3 | evopress | {seeds} | ")
        assert f" s{over}.*" in text and "commit " in text and "standings-dark.png" in text
    shutil.move(book / "brought", book / "results" / "third")
    make(monkeypatch, "--only", "third")
    again = (book / "results" / "third" / "1" / "output.txt").read_text()
    assert (book / "book" / "third.md").read_text().split("*AMD")[0].count("| evopress | 2 |") == 1
    assert "uniform: generations" not in again and "evopress" in again


def test_figures_are_drawn_light_and_dark(tmp_path: Path) -> None:
    made = shown.drawn(ROWS, ["standings", "size_quality"], tmp_path, name="main")
    assert [tone for tone, _ in made] == ["light", "dark"] * 2
    contents = [(tmp_path / name).read_bytes() for _, name in made]
    other = [{**row, "run": row["run"].replace("tiny", "large")} for row in ROWS]
    names = [name for _, name in shown.drawn([*ROWS, *other], ["size_quality"], tmp_path, name="main")]
    assert names == [
        f"main-size_quality-{model}-{tone}.png" for model in ("tiny", "large") for tone in ("light", "dark")
    ]
    assert len(set(contents)) == 4 and all(content.startswith(b"\x89PNG") for content in contents)


def test_json_lines_are_tables() -> None:
    text = 'said\n{"pass": "squares", "tokens": 2048}\n{"pass": "a|b", "tokens": 1}\n{"done": [1, 0.5]}\n'
    first, second = shown.json_lines([], [text]).split("\n\n")
    assert first.splitlines() == ["| pass | tokens |", "| --- | --- |", "| squares | 2,048 |", "| a\\|b | 1 |"]
    assert second.splitlines()[2] == "| 1, 0.5 |"
