"""Rules about units from the command line to the export."""

import json
from pathlib import Path

import pytest

from evosweep.core.results import read_result
from tests.cli import TINY, evosweep, workplace

QUIET = ["report=none", "tracking=none", "budget.as_uniform=4"]
DOWN = [f"model.layers.{block}.mlp.down_proj" for block in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("rules")) as folder:
        yield folder


def allocation_of(folder: Path, name: str) -> tuple[dict[str, str], dict]:
    (path,) = folder.glob(f"runs/{name}/*/result.json")
    return json.loads((path.parent / "allocation.json").read_text())["allocation"], read_result(path)


def test_a_search_keeps_its_rules_and_exports_what_it_found(folder: Path) -> None:
    rules = ["units.fix={*.o_proj: 2}", "units.min={mlp.(gate|up)_proj: 4bit}", "units.max={*.q_proj: 3}"]
    quoted = [rule.replace("(", "\\(").replace(")", "\\)") for rule in rules]
    assert evosweep(*TINY, *QUIET, *quoted, "units.exclude=[*.down_proj]", "name=kept") == 0
    found, row = allocation_of(folder, "kept")
    assert {level for name, level in found.items() if name.endswith("o_proj")} == {"2bit"}
    assert all(
        level in ("4bit", "5bit", "6bit") for name, level in found.items() if name.endswith(("gate_proj", "up_proj"))
    )
    assert all(level in ("2bit", "3bit") for name, level in found.items() if name.endswith("q_proj"))
    assert not set(DOWN) & set(found) and len(found) == 12
    assert row["export"]["max_logit_difference"] < 1e-4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["units.exclude=[mlp.dwn_proj]"], ["units.exclude[0]", "did you mean 'mlp.down_proj'"]),
        (["units.fix={self_attn.q: 3}"], ["units.fix[self_attn.q]", "did you mean 'self_attn.q_proj'"]),
        (["units.min={*.q_proj: 9}"], ["units.min[*.q_proj] must be one of 2bit", "got 9"]),
        (["units.min={*.q_proj: 4}", "units.max={*_proj: 3}"], ["units.min[*.q_proj]", "contradict", "layers.0"]),
        (
            ["units.tie=fused", "units.fix={*.q_proj: 4, *.v_proj: 3}"],
            ["units.fix[*.q_proj] must", "'fix[*.q_proj]=4 and fix[*.v_proj]=3'", "contradict"],
        ),
        (["units.max={*_proj: 2}", "units.min={*_proj: 2}"], ["units must be rules that leave some unit two levels"]),
    ],
)
def test_rules_that_cannot_be_kept_are_refused_in_one_line(folder, capfd, settings, words) -> None:
    assert evosweep(*TINY, *QUIET, *settings, "name=refused") == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and not list(folder.glob("runs/refused/*/result.json"))
