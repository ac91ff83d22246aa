"""A second budget from the command line to the table."""

import json
from pathlib import Path

import pytest

from evosweep.core.results import read_result
from tests.cli import TINY, evosweep, workplace

SEARCH = ["sampler=evopress", "report.artifacts=[]", "export=none"]
LATENCY = {"self_attn.*": {"2bit": 0.01, "3bit": 0.03, "4bit": 0.02, "5bit": 0.04, "6bit": 0.045, "8bit": 0.05}}
LATENCY["mlp.*"] = {name: 2 * value for name, value in LATENCY["self_attn.*"].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("second")) as folder:
        (folder / "latency.json").write_text(json.dumps({"milliseconds": LATENCY}))
        yield folder


def run(folder: Path, name: str) -> dict:
    (path,) = folder.glob(f"runs/{name}/*/result.json")
    return read_result(path)


def test_device_and_whole_both_hold_and_are_in_the_table(folder: Path, capfd) -> None:
    budget = ["budget.bits_per_weight=4", "budget.device_megabytes=0.143", "budget.on_device=['self_attn.*']"]
    assert evosweep(*TINY, *SEARCH, *budget, "name=device") == 0
    row = run(folder, "device")
    assert row["bits_per_weight"] <= 4 and row["device_megabytes"] <= 0.143 < row["size_mb"]
    assert row["budget"] == "bits_per_weight=4 device_megabytes=0.143"
    (allocation,) = folder.glob("runs/device/*/allocation.json")
    levels = json.loads(allocation.read_text())["allocation"]
    attention = [int(level[0]) for name, level in levels.items() if "self_attn" in name]
    others = [int(level[0]) for name, level in levels.items() if "mlp" in name]
    assert sum(attention) / len(attention) < sum(others) / len(others)
    assert "device MB" in capfd.readouterr().out


def test_milliseconds_alone_are_a_budget(folder: Path, capfd) -> None:
    timed = ["budget.milliseconds=0.32", "objective.latency=latency.json"]
    assert evosweep(*TINY, *SEARCH, *timed, "name=time") == 0
    row = run(folder, "time")
    assert row["budget"] == "milliseconds=0.32" and 0 < row["milliseconds"] <= 0.32
    assert " ms" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["budget.device_megabytes=0.001", "budget.on_device=['self_attn.*']"], "must be at least"),
        (["budget.device_megabytes=0.2"], "no experts"),
        (["budget.device_megabytes=0.2", "budget.on_device=[self_atn.q_proj]"], "did you mean"),
        (["budget.milliseconds=1"], "objective.latency"),
        (["budget.milliseconds=0.01", "objective.latency=latency.json"], "budget.milliseconds must be at least"),
        (["budget.milliseconds=1", "objective.latency=nowhere.json"], "objective.latency must be a readable JSON"),
        (["budget.milliseconds=1", "objective.latency=latency.json", "sampler=dp"], "one that holds"),
    ],
)
def test_bad_second_budgets_are_one_line(folder: Path, capfd, typed: list[str], said: str) -> None:
    assert evosweep(*TINY, *SEARCH, *typed, "name=bad") == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and said in errors[0], errors


def test_a_front_of_milliseconds_and_loss(folder: Path) -> None:
    search = ["sampler=nsga2_evopress", "sampler.against=milliseconds", "sampler.population_size=6"]
    more = [
        "search.offspring=8",
        "search.generations=3",
        "budget.bits_per_weight=6",
        "report.artifacts=[]",
        "export=none",
    ]
    assert evosweep(*TINY, *search, *more, "objective.latency=latency.json", "name=fast") == 0
    front = run(folder, "fast")["front"]
    times = [point["milliseconds"] for point in front]
    losses = [point["search_loss"] for point in front]
    assert len(front) >= 2 and times == sorted(times, reverse=True) and losses == sorted(losses)
    assert all(point["bits_per_weight"] <= 6 for point in front)
    for point in front:
        by_hand = sum(
            LATENCY["mlp.*" if "mlp" in name else "self_attn.*"][level] for name, level in point["allocation"].items()
        )
        assert point["milliseconds"] == pytest.approx(by_hand)


def test_an_objective_that_no_level_knows_is_refused(folder: Path, capfd) -> None:
    typed = ["sampler=nsga2_evopress", "sampler.against=milliseconds", "budget.bits_per_weight=6", "export=none"]
    assert evosweep(*TINY, *typed, "name=unknown") == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "sampler.against" in errors[0] and "objective.latency" in errors[0]
