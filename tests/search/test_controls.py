import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.search.controls import controls
from evosweep.testing.problems import make_problem
from tests.cli import TINY, evosweep, workplace


def test_widths_become_one_level_at_no_more_bits() -> None:
    problem = make_problem()
    winner = problem.uniform()
    winner[[0, 3]] = 2
    winner[[1, 4]] = 0
    found = controls(problem, winner)
    assert list(found) == ["widths"]
    assert (found["widths"] == problem.uniform()).all()
    assert problem.cost(found["widths"]) <= problem.cost(winner)
    assert controls(problem, problem.uniform()) == {}


def mixed() -> Problem:
    """Four blocks that can be dropped, each with a layer of bit-widths and one of sparsities."""
    units = []
    for block in range(4):
        wide, sparse = f"blocks.{block}.wide", f"blocks.{block}.sparse"
        drop = (Level("dropped", 0, nominal=Nominal("kept", 0)), Level("kept", 8, nominal=Nominal("kept", 1)))
        units.append(Unit(f"blocks.{block}", 1, block, drop, gates=(wide, sparse)))
        widths = tuple(Level(f"{n}bit", 10 * n, nominal=Nominal("bits", n)) for n in (2, 3, 4))
        units.append(Unit(wide, 10, block, widths))
        shares = tuple(Level(f"{s}%", 10 * (100 - s) // 10, nominal=Nominal("sparsity", s / 100)) for s in (75, 50, 25))
        units.append(Unit(sparse, 10, block, shares))
    return Problem(tuple(units), budget=sum(unit.levels[-1].cost for unit in units))


def test_each_kind_of_decision_has_a_control_of_its_own() -> None:
    whole = mixed()
    winner = np.array([1, 2, 0, 1, 0, 2, 0, 1, 1, 0, 0, 2])  # blocks 2 and 3 are dropped
    problem = replace(whole, budget=whole.cost(winner))
    found = controls(problem, winner)
    assert set(found) == {"widths", "sparsity", "drop mask"}
    assert (
        found["widths"][[1, 4]].tolist() == [1, 1]
        and (np.delete(found["widths"], [1, 4]) == np.delete(winner, [1, 4])).all()
    )
    assert found["sparsity"][[2, 5]].tolist() == [1, 1]
    dropped = found["drop mask"][::3]
    assert dropped.tolist() == [0, 1, 0, 1] or dropped.tolist() == [1, 0, 1, 0]
    assert all(problem.feasible(genome) for genome in found.values())


def test_a_searched_winner_has_controls_in_its_report(tmp_path: Path) -> None:
    with workplace(tmp_path) as folder:
        artifact = "report.artifacts=[{_target_: evosweep.tracking.artifacts.winner_controls.Controls}]"
        common = [*TINY, "tracking=none", "export=none", artifact, "budget.bits_per_weight=3.4"]
        assert evosweep(*common, "sampler=evopress", "name=searched") == 0
        assert evosweep(*common, "sampler=uniform", "name=static") == 0
        (report,) = folder.glob("runs/searched/*/report")
        rows = json.loads((report / "controls.json").read_text())["controls"]
        assert list(rows) == ["found", "widths", "uniform"]
        assert rows["found"]["share"] == 0 and rows["uniform"]["share"] == pytest.approx(1)
        assert rows["widths"]["bits_per_weight"] <= rows["found"]["bits_per_weight"]
        assert rows["widths"]["kl"] != rows["found"]["kl"]
        assert (report / "controls.png").stat().st_size > 1000
        assert not list(folder.glob("runs/static/*/report/controls.json"))
