"""What can be done with a run that is over: export, score, compare, resume; and with the cache."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from evosweep.core.allocation import Allocation
from evosweep.core.results import read_result
from evosweep.evaluate.scorer import StagedScorer
from evosweep.exporters.packed import load
from tests.cli import TINY, evosweep, workplace, write_corpus


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """Two runs: one tracked and not exported, one of another seed."""
    with workplace(tmp_path_factory.mktemp("after")) as folder:
        assert evosweep(*TINY, "sampler=evopress", "name=first", "export=none") == 0
        assert evosweep(*TINY, "sampler=uniform", "name=second", "export=none", "tracking=none") == 0
        yield folder


def run_of(folder: Path, name: str) -> Path:
    return next(folder.glob(f"runs/{name}/*/result.json")).parent


def test_an_earlier_run_is_exported_without_a_search(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    assert evosweep("export", str(run), "export=packed") == 0
    out = capsys.readouterr().out
    assert "MB on disk" in out
    row = read_result(run / "result.json")
    assert row["export"]["how_to_load"] in out and out.count("import load_packed") == 1
    tags = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}").get_run(row["mlflow_run"]).data.tags
    assert tags["export.path"] == str(run / "model") and tags["export.bytes"] == str(row["export"]["bytes"])
    assert row["export"]["max_logit_difference"] < 1e-4 and load(run / "model").config.vocab_size == 256
    assert Allocation.load(run / "model" / "allocation.json") == Allocation.load(run / "allocation.json")


def test_it_is_exported_by_the_id_of_its_mlflow_run_to_another_place(finished: Path) -> None:
    run_id = read_result(run_of(finished, "first") / "result.json")["mlflow_run"]
    assert evosweep("export", run_id, "export=dense", "--to", "elsewhere") == 0
    assert (finished / "elsewhere" / "model.safetensors").is_file()


def test_a_score_is_the_one_that_the_run_had(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    assert evosweep("score", str(run)) == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    row = read_result(run / "result.json")
    assert scored["kl"] == pytest.approx(row["kl"]) and scored["bits_per_weight"] == row["bits_per_weight"]


def test_other_text_scores_otherwise(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    (finished / "other").mkdir(exist_ok=True)
    write_corpus(finished / "other", documents=60)
    assert evosweep("score", str(run), "--split", "search", "data.path=other/corpus.jsonl") == 0
    other = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert other["split"] == "search" and other["kl"] > 0
    assert other["kl"] != pytest.approx(read_result(run / "result.json")["kl"], rel=1e-6)


def test_settings_that_have_no_value_yet_are_changed(finished: Path, capsys) -> None:
    """A text that a group's file leaves open, named before the file itself; a setting that is null."""
    run = run_of(finished, "first")
    (finished / "third").mkdir(exist_ok=True)
    write_corpus(finished / "third", documents=50)
    overrides = ["data.path=third/corpus.jsonl", "data=text", "evaluate.memory_gb=4"]
    assert evosweep("score", str(run), *overrides) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["kl"] > 0


def test_a_rotated_model_is_the_same_when_its_run_is_opened_again(finished: Path, capsys) -> None:
    arguments = ["transform=rotate", "+model.config.tie_word_embeddings=true", "tracking=none", "export=none"]
    assert evosweep(*TINY, *arguments, "sampler=uniform", "name=rotated") == 0
    assert "unties the head, which adds 0.066 MB" in capsys.readouterr().out
    run = run_of(finished, "rotated")
    assert evosweep("export", str(run), "export=packed") == 0
    model = load(run / "model")
    assert not model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight
    assert bool((model.model.norm.weight == 1).all())
    capsys.readouterr()
    assert evosweep("score", str(run)) == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert scored["kl"] == pytest.approx(read_result(run / "result.json")["kl"])


def test_runs_are_compared_by_folder_and_by_id(finished: Path, capsys) -> None:
    first = read_result(run_of(finished, "first") / "result.json")
    assert evosweep("compare", first["mlflow_run"], str(finished / "runs" / "second")) == 0
    out = capsys.readouterr().out
    assert "evopress" in out and "uniform" in out and "never selects" in out


def test_a_search_that_was_interrupted_goes_on_to_what_it_would_have_found(finished: Path, monkeypatch, capsys) -> None:
    arguments = [*TINY, "search.generations=4", "sampler=evopress", "seed=3", "export=none", "tracking=none"]
    assert evosweep(*arguments, "name=whole") == 0
    score, calls = StagedScorer.score, []

    def interrupted(self, genomes, *, generation: int, **place):
        calls.append(generation)
        if generation == 3:
            raise KeyboardInterrupt
        return score(self, genomes, generation=generation, **place)

    with monkeypatch.context() as patch:
        patch.setattr(StagedScorer, "score", interrupted)
        assert evosweep(*arguments, "name=broken") == 130
    run = next(finished.glob("runs/broken/*/allocation.json")).parent
    assert f"the best allocation so far is kept in {run}" in capsys.readouterr().err
    assert evosweep("resume", str(run)) == 0
    whole, resumed = read_result(run_of(finished, "whole") / "result.json"), read_result(run / "result.json")
    assert resumed["kl"] == whole["kl"] and len(resumed["history"]) == len(whole["history"]) == 5
    assert evosweep("resume", str(run)) == 2 and "is over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "nowhere"], "a run must be the folder of a run or the id of its MLflow run, got 'nowhere'"),
        (["export", "f" * 32], "MLflow has no run"),
        (["export", "runs"], "runs holds no run (no config.yaml); runs below it: runs/"),
        (["export", "{first}", "export=packd"], "export must be one of"),
        (["export", "{first}", "exprot.enabled=true"], "there is no setting 'exprot.enabled'"),
        (["export", "{first}", "export=none"], "export must be one that writes a model"),
        (["score", "{first}", "data.path=nowhere.jsonl"], "data.path: there is no file"),
        (["score", "{first}", "data=text"], "data.path must be given"),
        (
            ["score", "{first}", "evaluate.memry_gb=4"],
            "no setting 'evaluate.memry_gb' (did you mean 'evaluate.memory_gb'?)",
        ),
        (["score", "{first}", "model.seed=5"], "model cannot be changed for a score"),
        (["score", "{first}", "--splitt", "search"], "unrecognized: --splitt"),
        (["compare"], "the following arguments are required: runs"),
        (["compare", "corpus.jsonl"], "a run must be the folder of a run"),
        (["compare", "cache"], "there is no result.json in cache or below it"),
        (["resume", "{second}"], "is over"),
        (["cache", "clean"], "--older-than 30d"),
        (["cache", "clean", "--older-than", "soon"], "--older-than must be a number and m, h, d or w"),
        (["cache", "clean", "--larger-than", "big"], "--larger-than must be a number and MB or GB"),
    ],
)
def test_what_cannot_be_done_is_one_line(finished: Path, capsys, arguments: list[str], told: str) -> None:
    names = {name: str(run_of(finished, name)) for name in ("first", "second")}
    code = evosweep(*(text.format(**names) for text in arguments))
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.count("\n") == 0 and told in error and error.startswith("error: ")


def test_an_older_result_is_said_with_what_to_do(finished: Path, capsys) -> None:
    old = finished / "runs" / "old"
    shutil.copytree(run_of(finished, "second"), old / "x", dirs_exist_ok=True)
    (old / "x" / "result.json").write_text('{"kl": 1.0}')
    assert evosweep("compare", str(old)) == 2
    assert "has version 1 of results, this evosweep reads 2" in capsys.readouterr().err
    shutil.rmtree(old)


def test_the_cache_is_listed_and_cleaned(finished: Path, capsys) -> None:
    assert evosweep("cache", "list") == 0
    stores = [path for path in (finished / "cache" / "stores").iterdir() if path.is_dir()]
    assert stores and all(path.name in capsys.readouterr().out for path in stores[:1])
    assert evosweep("cache", "clean", "--older-than", "30d") == 0 and stores[0].is_dir()
    assert evosweep("cache", "clean", "--all", "--dry-run") == 0 and stores[0].is_dir()
    assert "would be removed" in capsys.readouterr().out
    assert evosweep("cache", "clean", "--all") == 0 and not stores[0].is_dir()
    run = run_of(finished, "second")
    assert evosweep("export", str(run), "export=packed") == 0  # makes the store anew
    assert (run / "model" / "packed.json").is_file()


def test_no_run_is_left_open(finished: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_model_that_changed_since_the_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(finished, "first")
    value = json.loads((run / "result.json").read_text())
    kept = (run / "result.json").read_text()
    (run / "result.json").write_text(json.dumps({**value, "store": "0123456789abcdef"}))
    try:
        assert evosweep("export", str(run), "export=dense") == 2
        assert evosweep("score", str(run)) == 2
    finally:
        (run / "result.json").write_text(kept)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("chose from level store 0123456789abcdef, its" in line for line in errors)
