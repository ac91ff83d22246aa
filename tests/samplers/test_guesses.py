"""Samplers that guess from gradients, curvature, noise or proxies, from the command line to the result."""

import json
from pathlib import Path

import pytest

from evosweep.core.results import read_result
from tests.cli import TINY, evosweep, workplace

SAMPLERS = ("fisher", "higgs", "hawq", "hawq_v2_pareto", "emq")
UNITS = 14
COUNTED = {"higgs": 2 * UNITS + 1, "emq": UNITS + 200, "hawq": UNITS * 6 * 3 // 2}
"""Windows of 64 tokens that a measurement is counted as, where it is not one a unit."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    with workplace(tmp_path_factory.mktemp("guesses")) as folder:
        settings = [f"sampler=uniform,{','.join(SAMPLERS)}", "evaluate.sensitivity_tokens=64", "name=guesses"]
        assert evosweep("-m", *TINY, *settings, "report=none", "tracking=none", "export=none") == 0
        found = [(path.parent, read_result(path)) for path in folder.glob("runs/guesses/*/*/result.json")]
        yield {_choice(run): {**row, "folder": run} for run, row in found}


def _choice(run: Path) -> str:
    text = (run / "config.yaml").read_text()
    target = text[text.index("sampler:") :].split("tracking:")[0]
    for name in ("hutchinson", "top_eigenvalue"):
        if name in target:
            return {"hutchinson": "hawq_v2_pareto", "top_eigenvalue": "hawq"}[name]
    return target.split("harm: ")[1].split()[0] if "harm: " in target else "uniform"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_finds_an_allocation_within_the_budget(rows: dict[str, dict], sampler: str) -> None:
    row = rows[sampler]
    assert row["bits_per_weight"] <= rows["uniform"]["bits_per_weight"] + 1e-9
    assert 0 < row["kl"] < 10
    assert len(json.loads((row["folder"] / "allocation.json").read_text())["allocation"]) == UNITS
    assert row["tokens"] == COUNTED.get(sampler, UNITS) * 64


def test_they_do_not_all_guess_the_same(rows: dict[str, dict]) -> None:
    found = {(rows[name]["folder"] / "allocation.json").read_text().split('"bits_per_weight"')[0] for name in SAMPLERS}
    assert len(found) >= 3
