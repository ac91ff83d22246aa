"""A list of budgets in one run."""

import json
from pathlib import Path

import mlflow
import pytest

from evosweep.budget_list import order_of
from evosweep.core.results import read_result
from tests.cli import TINY, evosweep, workplace

BUDGETS = [2.75, 4.0, 3.5]
SEARCH = [
    "sampler=evopress_ilp",
    "search.generations=6",
    "search.offspring=8",
    "report.artifacts=[]",
    "export=none",
]


def test_the_middle_budget_is_first_and_others_follow_outwards() -> None:
    assert order_of([10]) == [(0, None)]
    assert order_of([40, 10, 20, 33]) == [(3, None), (0, 3), (2, 3), (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("several")) as folder:
        assert evosweep(*TINY, *SEARCH, f"budget.bits_per_weight={BUDGETS}", "name=several") == 0
        yield folder


def test_a_list_of_one_budget_is_that_budget(folder: Path) -> None:
    assert evosweep(*TINY, "sampler=uniform", "budget.as_uniform=[3]", "report=none", "export=none", "name=one") == 0
    (found,) = folder.glob("runs/one/*/result.json")  # in the run's folder, as of a single budget
    row = read_result(found)
    assert row["budget"] == "as_uniform=3"
    assert row["bits_per_weight"] == pytest.approx(3 + (16 + 3) / 64)  # codes; a scale and a zero for 64 weights


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (found,) = folder.glob("runs/several/*/")
    return found


@pytest.fixture(scope="module")
def rows(run: Path) -> dict[float, dict]:
    return {value: read_result(run / f"bits_per_weight_{value}" / "result.json") for value in BUDGETS}


def test_every_budget_has_a_winner_within_it(rows: dict[float, dict]) -> None:
    assert all(row["bits_per_weight"] <= value for value, row in rows.items())
    assert all(row["budget"] == f"bits_per_weight={value:g}" for value, row in rows.items())
    assert rows[2.75]["kl"] > rows[3.5]["kl"] > rows[4.0]["kl"]


def test_one_measurement_serves_all_and_the_others_cost_a_third_at_most(run: Path, rows: dict[float, dict]) -> None:
    assert [path.parent.name for path in run.glob("*/measured.json")] == ["bits_per_weight_3.5"]
    measured = json.loads((run / "bits_per_weight_3.5" / "measured.json").read_text())
    total = sum(row["tokens"] for row in rows.values())
    assert 0 < measured["tokens"] < rows[3.5]["tokens"] < total <= 1.3 * rows[3.5]["tokens"]
    assert (run / "run.log").read_text().count("measuring every level") == 1


def test_the_others_begin_at_the_neighbours_winner_too(run: Path) -> None:
    lines = (run / "bits_per_weight_4.0" / "search_state.jsonl").read_text().splitlines()
    start = json.loads(lines[1])
    assert 1 < len(start["candidates"]["genomes"]) <= 5  # where the ILP begins, and where its neighbour ended


def test_there_is_one_table_and_one_figure_of_size_and_quality(run: Path) -> None:
    table = json.loads((run / "report" / "comparison.json").read_text())
    assert [line[0] for line in table["data"]] == [f"bits_per_weight={value:g}" for value in sorted(BUDGETS)]
    assert (run / "report" / "size_quality.png").stat().st_size > 1000


def test_mlflow_has_one_parent_of_all(folder: Path, rows: dict[float, dict]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    parents = {client.get_run(row["mlflow_run"]).data.tags["mlflow.parentRunId"] for row in rows.values()}
    (parent,) = parents
    assert client.get_run(parent).info.status == "FINISHED"
    assert "size_quality.png" in {file.path for file in client.list_artifacts(parent)}


def test_a_finished_run_is_not_run_again_and_an_unfinished_one_goes_on(folder, run, rows, capfd) -> None:
    command = [*TINY, *SEARCH, f"budget.bits_per_weight={BUDGETS}", "name=several"]
    before = {path: path.read_bytes() for path in run.glob("*/result.json")}
    lost = run / "bits_per_weight_2.75"
    record = json.loads((lost / "run.json").read_text())
    (lost / "run.json").write_text(json.dumps({**record, "finished": False}))
    main = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**main, "finished": False}))
    lines = (lost / "search_state.jsonl").read_text().splitlines(keepends=True)
    (lost / "search_state.jsonl").write_text("".join(lines[:2]))
    (lost / "result.json").unlink()
    assert evosweep(*command, f"resume={run}") == 0
    assert (lost / "search_state.jsonl").read_text().count("\n") == len(lines)
    again = read_result(lost / "result.json")
    assert {key: again[key] for key in ("kl", "tokens", "bits_per_weight")} == {
        key: rows[2.75][key] for key in ("kl", "tokens", "bits_per_weight")
    }
    others = [path for path in before if path.parent != lost]
    assert len(others) == 2 and all(path.read_bytes() == before[path] for path in others)
    assert evosweep("export", str(run)) == 2
    assert "bits_per_weight_2.75" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("budget.bits_per_weight=[1,3.5,1.5]", ["2 of 3 budgets cannot be met (1, 1.5)", "at least"]),
        ("budget.bits_per_weight=[]", ["budget.bits_per_weight must be one budget, or a list of two"]),
        ("budget.bits_per_weight=[3,3]", ["budget.bits_per_weight must be one budget, or a list of two"]),
        ("budget.bits_per_weight=[50,60]", ["different size here"]),
        ("budget.as_uniform=[3,9]", ["budget.as_uniform must be one of 2, 3", "got 9"]),
    ],
)
def test_lists_that_cannot_be_met_are_refused_before_any_work(folder, capfd, budget: str, words: list[str]) -> None:
    assert evosweep(*TINY, *SEARCH, budget, "name=refused") == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words) and "Traceback" not in error, error
    assert not list(folder.glob("runs/refused/*/config.yaml"))


def test_a_later_budget_is_solved_by_what_the_list_measured(run: Path, rows: dict[float, dict]) -> None:
    assert evosweep("resolve", str(run), "budget.bits_per_weight=3.75") == 0
    row = read_result(run / "resolved" / "bits_per_weight_3.75" / "result.json")
    assert row["predicted"] and row["made_of"].startswith("ilp by around_top")
    assert rows[3.5]["kl"] > row["kl"] > 0 and 3.5 < row["bits_per_weight"] <= 3.75
