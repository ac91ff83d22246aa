"""What can be done with a run that is over: export, score, compare, resume; and with the cache."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from evosweep.cli.job import forget_bench
from evosweep.core.allocation import Allocation
from evosweep.core.results import read_result
from evosweep.evaluate.scorer import StagedScorer
from evosweep.exporters.packed import load
from tests.cli import TINY, evosweep, workplace, write_corpus
from tests.evaluate.tasks.test_tasks import FILE


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


def test_several_formats_at_once_have_a_folder_each(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    assert evosweep("export", str(run), "export=packed,dense,recipe") == 0
    assert (run / "models" / "packed" / "packed.json").is_file()
    assert (run / "models" / "dense" / "model.safetensors").is_file()
    assert (run / "models" / "recipe" / "evopress.txt").is_file()
    exports = read_result(run / "result.json")["exports"]
    assert {name: Path(facts["path"]).name for name, facts in exports.items()} == {
        name: name for name in ("packed", "dense", "recipe")
    }
    assert capsys.readouterr().out.count("MB on disk") == 3


def test_nothing_is_written_where_one_of_several_formats_cannot_be(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    assert evosweep("export", str(run), "export=dense,recipe", "export.format=modelopt", "--to", "both") == 2
    assert "export.format must be a tool that makes 2bit of" in capsys.readouterr().err
    assert not (finished / "both").exists()
    assert evosweep("export", str(run), "export=packed,dense", "export.check_tokens=0", "--to", "both") == 2
    assert evosweep("export", str(run), "export=packed,dense", "export.format=modelopt", "--to", "both") == 2
    assert "there is no setting export.format of packed, dense" in capsys.readouterr().err
    assert not (finished / "both").exists()


def test_a_folder_with_something_in_it_is_left_alone(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    (finished / "mine").mkdir()
    (finished / "mine" / "thesis.tex").write_text("all of it")
    assert evosweep("export", str(run), "export=dense", "--to", "mine") == 2
    assert "--to must be an empty folder or a new one, and mine is not empty" in capsys.readouterr().err
    assert (finished / "mine" / "thesis.tex").read_text() == "all of it"


def test_a_run_whose_folder_is_gone_is_exported_from_what_mlflow_has(finished: Path, capsys) -> None:
    assert evosweep(*TINY, "sampler=uniform", "name=gone", "export=none") == 0
    run = run_of(finished, "gone")
    run_id = read_result(run / "result.json")["mlflow_run"]
    winner = Allocation.load(run / "allocation.json")
    shutil.rmtree(run)
    assert evosweep("export", run_id, "export=packed", "--to", "restored") == 0
    assert Allocation.load(finished / "restored" / "allocation.json") == winner


def test_an_export_is_registered_as_a_model_that_mlflow_loads(finished: Path) -> None:
    run = run_of(finished, "first")
    for version in ("1", "2"):
        assert evosweep("export", str(run), "export=dense", "export.register=tiny-3bit") == 0
        client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
        made = client.get_model_version("tiny-3bit", version)
        row = read_result(run / "result.json")
        assert made.run_id == row["mlflow_run"] and float(made.tags["kl"]) == pytest.approx(row["kl"], rel=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished / 'mlflow.db'}")
        model = mlflow.pyfunc.load_model("models:/tiny-3bit/2")
        example = model.input_example
        assert example == ["The capital of France is"] and "max_new_tokens" in str(model.metadata.signature)
        assert isinstance(model.predict(example, params={"max_new_tokens": 2})[0], str)


def test_a_search_registers_its_winner(finished: Path) -> None:
    assert evosweep(*TINY, "sampler=uniform", "name=registered", "export=packed", "export.register=small one") == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    row = read_result(run_of(finished, "registered") / "result.json")
    assert client.get_model_version("small one", "1").run_id == row["mlflow_run"]
    assert row["export"]["register"] == "small one"


def test_any_allocation_is_scored_without_a_search(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    row = read_result(run / "result.json")
    settings = [text for text in TINY if not text.startswith("search.")]
    assert evosweep("score", f"allocation={run / 'allocation.json'}", *settings) == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert scored["kl"] == pytest.approx(row["kl"]) and scored["bits_per_weight"] == row["bits_per_weight"]
    units = Allocation.load(run / "allocation.json")
    (finished / "all4.txt").write_text("".join(f"{unit}: 4\n" for unit in units))
    assert evosweep("score", str(run), "allocation=all4.txt", "--split", "search") == 0
    better = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert better["split"] == "search" and better["kl"] < scored["kl"]
    assert better["bits_per_weight"] > scored["bits_per_weight"]


def test_a_score_is_the_one_that_the_run_had(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    assert evosweep("score", str(run)) == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    row = read_result(run / "result.json")
    assert scored["kl"] == pytest.approx(row["kl"]) and scored["bits_per_weight"] == row["bits_per_weight"]


def test_tasks_are_asked_of_an_earlier_run(finished: Path, capsys) -> None:
    run = run_of(finished, "first")
    (finished / "own.jsonl").write_bytes(FILE)
    capsys.readouterr()
    assert evosweep("score", str(run), "tasks=core", "tasks.names=[]", "tasks.files=[own.jsonl]") == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert scored["tasks"]["own"]["questions"] == 3
    assert scored["tasks"]["own"]["accuracy"] * 3 == pytest.approx(scored["tasks"]["own"]["correct"].count("1"))
    assert scored["kl"] == pytest.approx(read_result(run / "result.json")["kl"])  # on the run's own text


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
        (["export", "{first}", "export=dense,dense"], "export must name each format once, got dense, dense"),
        (["export", "{first}", "export=dense", "--to", "corpus.jsonl"], "--to must be a folder, got the file"),
        (["export", "{begun}"], "has no winner: it ended before its first generation was over; python -m"),
        (["score", "{begun}"], "has no winner"),
        (
            ["export", "{first}", "export=recipe", "export.register=x"],
            "export.register must be null, got 'x'; no",
        ),
        (["export", "{second}", "export=dense", "export.register=x"], "'x'; runs are not tracked: tracking=mlflow"),
        (
            ["export", "{first}", "export=dense", "export.register=a/b"],
            "export.register must be null, or a name",
        ),
        (["score"], "score needs a run, or allocation=<file>"),
        (["score", "model=tiny"], "score needs a run, or allocation=<file>"),
        (["score", "allocation=none.txt", *TINY[:6]], "allocation file none.txt cannot be read"),
        (["score", "allocation=none.txt", "allocation=x"], "score takes one allocation=<file>, got 2"),
        (["score", "{first}", "allocation=corpus.jsonl"], "corpus.jsonl is not an allocation.json"),
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
    begun = finished / "runs" / "begun" / "x"
    begun.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(names["first"]) / "config.yaml", begun)
    names["begun"] = str(begun)
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
    forget_bench()  # a command is a process of its own
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
