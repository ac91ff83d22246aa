"""Another budget solved from what a run left."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evosweep.allocators.harm import Harm
from evosweep.allocators.ilp import ILP
from evosweep.allocators.resolve import Winner, resolve
from evosweep.core.results import read_result
from evosweep.evaluate.population import Evaluator
from evosweep.testing.problems import make_problem
from tests.cli import TINY, evosweep, workplace

SEARCH = ["sampler=evopress_ilp", "report.artifacts=[]", "export=none", "budget.bits_per_weight=3.5"]


def test_without_winners_it_is_the_ilp_at_that_size() -> None:
    problem = make_problem()
    found = resolve(problem, Harm("bare"), [])
    assert (found.genome == ILP(harm="bare").allocate(problem)).all() and found.kl is None


def test_what_a_search_changed_is_kept_and_the_rest_solved() -> None:
    wide = make_problem()
    harm = Harm("bare")
    narrow = wide.within(int(0.95 * wide.budget))
    winner = ILP(harm="bare").allocate(wide)
    up = int(np.flatnonzero(winner < wide.sizes - 1)[0])
    winner[up] += 1  # what a search found better than the model says; others give way
    down = next(
        index
        for index in np.flatnonzero(winner > 0)
        if index != up and wide.falls[index, winner[index]] >= wide.rises[up, winner[up] - 1]
    )
    winner[down] -= 1
    found = resolve(narrow, harm, [Winner("run", winner, 0.2, searched=True)])
    plain = ILP(harm="bare").allocate(narrow)
    assert narrow.feasible(found.genome)
    assert found.genome[up] == min(plain[up] + 1, wide.sizes[up] - 1) and "changes of run" in found.made_of
    table = harm.table(narrow)
    rows = np.arange(len(winner))
    ratio = table[rows, found.genome].sum() / table[rows, winner].sum()
    assert found.kl == pytest.approx(0.2 * ratio)
    far = wide.within((wide.least + wide.budget) // 3)
    assert (
        resolve(far, harm, [Winner("run", winner, 0.2, searched=True)]).genome == ILP(harm="bare").allocate(far)
    ).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("resolve")) as folder:
        assert evosweep(*TINY, *SEARCH, "name=first") == 0
        yield folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (found,) = folder.glob("runs/first/*/")
    return found


def test_another_budget_is_solved_without_scoring_and_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    scored: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        scored.append("scored")
        raise AssertionError("something was scored")

    with monkeypatch.context() as patch:
        for name in ("score", "token_losses"):
            patch.setattr(Evaluator, name, refuse)
        assert evosweep("resolve", str(run), "budget.bits_per_weight=[2.75,4.5]") == 0
    out = " ".join(capfd.readouterr().out.split())
    assert not scored and "predicted" in out and "nothing was scored" in out
    rows = {}
    for value in (2.75, 4.5):
        target = run / "resolved" / f"bits_per_weight_{value}"
        row = read_result(target / "result.json")
        rows[value] = row
        assert row["predicted"] is True and row["tokens"] == 0 and row["bits_per_weight"] <= value
        assert row["bits_per_weight"] > value - 0.2
        saved = json.loads((target / "allocation.json").read_text())
        assert saved["predicted"] is True and saved["size_mb"] == row["size_mb"]
    first = read_result(run / "result.json")
    assert rows[2.75]["kl"] > first["kl"] > rows[4.5]["kl"]
    target = run / "resolved" / "bits_per_weight_2.75"
    assert evosweep("export", str(target), "export=packed") == 0
    row = read_result(target / "result.json")
    assert row["export"]["max_logit_difference"] < 1e-4


def test_a_run_without_measurements_is_solved_by_its_layer_errors(folder: Path) -> None:
    assert evosweep(*TINY, "sampler=uniform", *SEARCH[1:], "name=plain") == 0
    (plain,) = folder.glob("runs/plain/*/")
    assert evosweep("resolve", str(plain), "budget.bits_per_weight=3") == 0
    row = read_result(plain / "resolved" / "bits_per_weight_3" / "result.json")
    assert row["made_of"] == "ilp by bare"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "resolve takes one budget"),
        (["budget.bits_per_weight=0.1"], "budget.bits_per_weight must be at least"),
        (["budget.megabyte=3"], "(did you mean 'megabytes'?)"),
        (["budget.megabytes=abc"], "budget.megabytes must be a number"),
        (["budget.as_uniform=9"], "budget.as_uniform must be one of"),
        (["sampler=ilp"], "resolve takes one budget"),
    ],
)
def test_bad_budgets_are_one_line(run: Path, capfd, typed: list[str], said: str) -> None:
    assert evosweep("resolve", str(run), *typed) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and said in errors[0], errors


@pytest.mark.parametrize(
    ("damage", "command", "said"),
    [
        ({"result.json": None}, "resolve", "no search of the run in"),
        ({"measured.json": "{"}, "resolve", "measured.json, which holds what was measured"),
        ({"config.yaml": "name: first\n"}, "export", "config.yaml was cut short"),
        ({"config.yaml": "a: [1"}, "score", "config.yaml is no YAML"),
        ({"allocation.json": '{"allocation": {"a": "3bit"}}'}, "score", "allocation.json: allocation does not fit"),
        ({"result.json": '{"version": 2}'}, "compare", "result.json is of no run that is over"),
    ],
)
def test_what_is_half_there_is_one_line(run: Path, tmp_path, capfd, damage: dict, command: str, said: str) -> None:
    half = shutil.copytree(run, tmp_path / "half")
    for name, text in damage.items():
        (half / name).unlink()
        if text is not None:
            (half / name).write_text(text)
    more = {"resolve": ["budget.bits_per_weight=3.25"], "export": ["export=dense"]}
    assert evosweep(command, str(half), *more.get(command, [])) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and said in errors[0], errors
