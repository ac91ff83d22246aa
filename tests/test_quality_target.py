"""A quality to hold at the smallest size."""

import json
from pathlib import Path

import optuna
import pytest

from tests.cli import TINY, evosweep, workplace

SEARCH = ["sampler=evopress_ilp", "search.generations=3", "search.offspring=6", "report=none", "tracking=none"]
TARGET = ["target.kl=0.02", "target.searches=4", "target.within=0.02", "target.tokens=1024"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("target")) as folder:
        assert evosweep(*TINY, *SEARCH, *TARGET, "name=target") == 0
        yield folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (found,) = folder.glob("runs/target/*/")
    return found


def test_the_smallest_size_that_holds_is_exported(run: Path) -> None:
    found = json.loads((run / "target.json").read_text())
    held = [step for step in found["searched"] if step["holds"]]
    assert all((step["kl"] <= 0.02) == step["holds"] for step in found["searched"])
    smallest = min(held, key=lambda step: step["size_mb"])
    assert found["winner"] == smallest["folder"]
    assert [path.parent.name for path in run.glob("*/model")] == [smallest["folder"]]
    assert len(found["searched"]) > 1 and len(list(run.glob("*/measured.json"))) == 0
    assert (run / "measured.json").is_file()


def test_the_study_of_sizes_has_a_trial_for_each(folder: Path, run: Path) -> None:
    (journal,) = folder.glob("studies/*target*")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    (name,) = [name for name in optuna.get_all_study_names(storage) if name.endswith("kl=0.02")]
    study = optuna.load_study(study_name=name, storage=storage)
    steps = json.loads((run / "target.json").read_text())["searched"]
    assert [trial.value for trial in study.trials] == [pytest.approx(step["size_mb"]) for step in steps]
    holds = [trial.constraints["excess"] <= 0 for trial in study.trials]
    assert holds == [step["holds"] for step in steps]
    assert study.best_trial.value == min(step["size_mb"] for step in steps if step["holds"])


def test_a_finished_target_is_not_searched_again_and_its_winner_is_exported_by_the_runs_name(folder, run) -> None:
    before = (run / "target.json").read_bytes()
    assert evosweep(*TINY, *SEARCH, *TARGET, "name=target", f"resume={run}") == 2  # it is over
    assert (run / "target.json").read_bytes() == before
    assert evosweep("export", str(run), "export=dense", "--to", str(folder / "dense")) == 0
    assert (folder / "dense" / "model.safetensors").is_file()


def test_a_further_size_is_solved_by_what_the_run_measured(run: Path, capfd) -> None:
    assert evosweep("resolve", str(run), "budget.bits_per_weight=3.5") == 0
    assert "by around_top" in " ".join(capfd.readouterr().out.split())  # what evopress_ilp measures, for all sizes
    row = json.loads((run / "resolved" / "bits_per_weight_3.5" / "result.json").read_text())
    assert row["made_of"].startswith("ilp by around_top")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["target.kl=0.0000001"], ["target.kl=1e-07 is below what these levels reach: kl 0.0"]),
        (["target.ppl_ratio=0.9"], ["target.ppl_ratio must be", "above 1", "0.9"]),
        (["target.kl=0.1", "target.ppl_ratio=1.1"], ["target must be one of kl, ppl_ratio"]),
        (["target.kl=0.1", "budget.as_uniform=3"], ["target must be given without a budget"]),
        (["target.kll=0.1"], ["'target.kll'", "did you mean 'target.kl'"]),
    ],
)
def test_targets_that_cannot_be_held_are_refused(folder, capfd, settings: list[str], words: list[str]) -> None:
    assert evosweep(*TINY, *SEARCH, *settings, "name=refused") == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words) and "Traceback" not in error, error
    assert not list(folder.glob("runs/refused/*/config.yaml"))
