"""The whole line on the tiny model: multirun, MLflow, Optuna, export; and what is kept when it breaks."""

import json
import re
import sqlite3
from pathlib import Path

import mlflow
import optuna
import pytest
import torch
import transformers
from mlflow import MlflowClient
from optuna_dashboard import get_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from PIL import Image

from evosweep.core.allocation import Allocation
from evosweep.core.results import read_result
from evosweep.evaluate.scorer import StagedScorer
from evosweep.samplers.level_codes import allocation_of
from evosweep.tracking.artifacts.heatmap import CELL
from evosweep.tracking.study.dashboard import EXPLAINED
from evosweep.tracking.study.storage import Journal
from tests.cli import TINY, evosweep, workplace, write_corpus


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A multirun of every sampler, in a folder of its own."""
    with workplace(tmp_path_factory.mktemp("run")) as folder:
        stores = folder / "cache" / "stores"
        assert (
            evosweep(
                "-m",
                *TINY,
                "sampler=uniform,owl,ilp,evopress,random,evopress_ilp",
                "name=whole",
                "export=dense",
                "export.jobs=all",
            )
            == 0
        )
        assert len([path for path in stores.iterdir() if path.is_dir()]) == 1  # one store serves all
        yield folder


@pytest.fixture(scope="module")
def client(finished: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")


@pytest.fixture(scope="module")
def runs(client: MlflowClient) -> dict:
    experiment = client.get_experiment_by_name("whole")
    found = client.search_runs([experiment.experiment_id])
    return {run.data.params.get("sampler", "parent").replace("_", "+"): run for run in found}


def results(folder: Path) -> dict[str, dict]:
    rows = [read_result(path) for path in folder.glob("runs/whole/*/*/result.json")]
    return {row["sampler"]: row for row in rows}


SAMPLERS = ["uniform", "owl", "ilp", "evopress", "random", "evopress+ilp"]


def test_every_sampler_stays_within_the_same_true_budget(finished: Path) -> None:
    rows = results(finished)
    assert set(rows) == set(SAMPLERS)
    assert all(row["bits_per_weight"] <= rows["uniform"]["bits_per_weight"] for row in rows.values())


def test_one_run_a_search_under_one_parent(runs: dict) -> None:
    assert set(runs) == {*SAMPLERS, "parent"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    parents = {runs[name].data.tags["mlflow.parentRunId"] for name in SAMPLERS}
    assert parents == {runs["parent"].info.run_id}


def test_every_generation_is_a_step(client: MlflowClient, runs: dict) -> None:
    run = runs["evopress"].info.run_id
    for metric in ("search/tokens", "search/tokens_per_second"):
        assert [point.step for point in client.get_metric_history(run, metric)] == [0, 1, 2], metric
    gains = [point.value for point in client.get_metric_history(run, "stages/0_gain_over_median")]
    assert gains and min(gains) >= 0


def test_artifacts_are_there(client: MlflowClient, runs: dict) -> None:
    run = runs["evopress"].info.run_id
    names = {artifact.path for artifact in client.list_artifacts(run)}
    figures = {"allocation.png", "convergence.png", "additivity.png", "stages.png"}
    assert names >= {"allocation.json", "trade_off.json", "config.yaml", "result.json", "report.html"} | figures
    generations = {artifact.path for artifact in client.list_artifacts(run, "generations")}
    assert generations == {f"generations/{n:04d}" for n in range(3)}
    assert {a.path for a in client.list_artifacts(runs["parent"].info.run_id)} >= {
        "summary.json",
        "summary.txt",
        "comparison.json",
        "convergence.png",
        "winner.html",
        "winner.png",
    }
    note = runs["parent"].data.tags["mlflow.note.content"]
    assert "The winner's report is under Artifacts: winner.html." in note and "- found: " in note


def test_the_elite_can_be_watched_as_pictures(client: MlflowClient, runs: dict, finished: Path) -> None:
    run = runs["random"].info.run_id
    found = [Path(client.download_artifacts(run, f"generations/{n:04d}/allocation.json")) for n in range(3)]
    elites = [json.loads(path.read_text())["allocation"] for path in found]
    changed = {0} | {step for step in (1, 2) if elites[step] != elites[step - 1]}
    names = [artifact.path for artifact in client.list_artifacts(run, "images")]
    assert {int(re.search(r"levels\+step\+(\d+)\+", name).group(1)) for name in names} == changed
    picture = Image.open(client.download_artifacts(run, next(name for name in names if name.endswith(".png"))))
    assert picture.width > 2 * CELL and picture.height > 7 * CELL  # two blocks of seven linears, labels, a legend


def test_notes_say_what_was_found(client: MlflowClient, runs: dict, finished: Path) -> None:
    row = results(finished)["evopress"]
    note = runs["evopress"].data.tags["mlflow.note.content"]
    assert f"{row['kl']:.4f}" in note and "| self_attn.q_proj |" in note
    assert "| as_uniform=3 | evopress | 1 |" in runs["parent"].data.tags["mlflow.note.content"]
    storage = Journal(path=str(finished / "studies" / "whole.journal")).open()
    name = next(each.study_name for each in optuna.get_all_study_summaries(storage) if "evopress as" in each.study_name)
    assert get_note(optuna.load_study(study_name=name, storage=storage)) == f"{note}\n\n{EXPLAINED}"


def test_a_run_names_its_texts_and_its_study(runs: dict) -> None:
    inputs = {each.tags[0].value: each.dataset for each in runs["ilp"].inputs.dataset_inputs}
    assert set(inputs) == {"calibration", "search", "validation"}
    assert len({dataset.digest for dataset in inputs.values()}) == 3
    tags = runs["ilp"].data.tags
    assert re.fullmatch(r"[0-9a-f]{40}", tags.get("mlflow.source.git.commit", "0" * 40))
    assert tags["study"].startswith("tiny ilp as_uniform=3 s0") and len(tags["problem"]) == 16 and tags["evosweep"]


def test_the_report_is_one_page_that_needs_no_network(finished: Path) -> None:
    page = next(finished.glob("runs/whole/*/3/report/report.html")).read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 6
    assert "http" not in page.split("<details>")[0] and "python -m evosweep" in page and "from_pretrained(" in page


def test_layers_are_a_table_of_the_run(client: MlflowClient, runs: dict, finished: Path) -> None:
    run = runs["evopress"].info.run_id
    table = json.loads(Path(client.download_artifacts(run, "allocation_table.json")).read_text())
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert {row["name"]: row["level"] for row in rows} == dict(
        Allocation.load(next(finished.glob("runs/whole/*/3/allocation.json")))
    )
    weights = sum(row["weights"] for row in rows)
    mean = sum(row["weights"] * row["bits_per_weight"] for row in rows) / weights
    assert mean == pytest.approx(results(finished)["evopress"]["bits_per_weight"])


def test_a_run_is_a_recipe_and_no_model(client: MlflowClient, runs: dict, finished: Path) -> None:
    assert not runs["ilp"].outputs.model_outputs
    allocation = Path(client.download_artifacts(runs["ilp"].info.run_id, "allocation.json"))
    assert Allocation.load(allocation) == Allocation.load(next(finished.glob("runs/whole/*/2/allocation.json")))
    start = [f"sampler.start={allocation}", "search.generations=0"]
    assert evosweep(*TINY, "sampler=evopress", *start, "name=recipe", "tracking=none", "storage=memory") == 0
    again = next(finished.glob("runs/recipe/*/allocation.json"))
    assert Allocation.load(again) == Allocation.load(allocation)
    assert (again.parent / "model").is_dir()


def test_a_logged_model_loads_in_plain_transformers_and_as_pyfunc(finished: Path) -> None:
    assert evosweep(*TINY, "sampler=uniform", "name=weighty", "tracking.model=weights", "export=dense") == 0
    uri = f"sqlite:///{finished / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("weighty").experiment_id])
    made = run.outputs.model_outputs[0].model_id
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{made}", tracking_uri=uri))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "artifacts" / "model")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".bin", ".pt")]
    texts = mlflow.pyfunc.load_model(str(folder)).predict(["the layer that matters", "weights"])
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_params_are_what_runs_are_compared_by(runs: dict) -> None:
    params = runs["evopress"].data.params
    assert 6 <= len(params) <= 10 and params["model"] == "tiny" and params["seed"] == "0"
    assert params["compressor"] == "gptq" and params["budget"] == "as_uniform=3"


def test_result_metrics_are_what_the_file_says(finished: Path, runs: dict) -> None:
    for name, row in results(finished).items():
        assert runs[name].data.metrics["kl"] == pytest.approx(row["kl"], rel=1e-3)
        assert row["mlflow_run"] == runs[name].info.run_id


def test_studies_can_be_read(finished: Path) -> None:
    storage = Journal(path=str(finished / "studies" / "whole.journal")).open()
    studies = {summary.study_name.split()[1]: summary for summary in optuna.get_all_study_summaries(storage)}
    assert set(studies) == set(SAMPLERS)
    study = optuna.load_study(study_name=studies["evopress"].study_name, storage=storage)
    assert len(study.trials) == 1 + 2 * 4 + 1
    run = results(finished)["evopress"]["mlflow_run"]
    assert study.user_attrs["mlflow_run"] == study.best_trial.user_attrs["mlflow_run"] == run
    trial = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}").get_run(run).data.tags["trial"]
    winner = allocation_of(study, study.trials[int(trial)])
    assert winner == Allocation.load(next(finished.glob("runs/whole/*/3/allocation.json")))
    assert study.user_attrs["winner"] == dict(Allocation.load(next(finished.glob("runs/whole/*/3/allocation.json"))))


def test_the_dashboard_shows_the_study(finished: Path) -> None:
    from optuna_dashboard import wsgi

    app = wsgi(Journal(path=str(finished / "studies" / "whole.journal")).open())
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/studies",
        "QUERY_STRING": "",
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
    }
    body = b"".join(app(environ, lambda code, *_: status.append(code)))
    assert status == ["200 OK"] and len(json.loads(body)["study_summaries"]) == len(SAMPLERS)


def test_the_dashboard_has_pictures_and_our_figures(finished: Path) -> None:
    storage = Journal(path=str(finished / "studies" / "whole.journal")).open()
    name = next(each.study_name for each in optuna.get_all_study_summaries(storage) if "random as" in each.study_name)
    study = optuna.load_study(study_name=name, storage=storage)
    pictures = optuna.artifacts.get_all_artifact_meta(study.best_trial, storage=storage)
    assert [each.mimetype for each in pictures] == ["image/png"]
    assert (finished / "studies" / "artifacts" / pictures[0].artifact_id).is_file()
    figures = get_plotly_graph_objects(storage.get_study_system_attrs(study._study_id))
    assert set(figures) == {"convergence", "levels"}
    assert all(json.loads(figure)["data"] for figure in figures.values())


def test_the_exported_model_loads_in_plain_transformers(finished: Path) -> None:
    folder = next(finished.glob("runs/whole/*/3/model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer("the layer that matters").input_ids])
    assert model(input_ids=tokens).logits.isfinite().all()
    assert (folder / "allocation.json").exists()


@pytest.mark.parametrize("choice", [["sampler=hawq_v2"], ["sampler=evopress", "sampler.population_size=3"]])
def test_other_samplers_run_whole(finished: Path, choice: list[str]) -> None:
    name = choice[-1].split("=")[-1]
    assert evosweep(*TINY, *choice, f"name=other_{name}", "tracking=none", "storage=memory", "export=none") == 0
    row = read_result(next(finished.glob(f"runs/other_{name}/*/result.json")))
    assert row["bits_per_weight"] <= results(finished)["uniform"]["bits_per_weight"]


def test_the_same_seed_gives_the_same_winner(finished: Path) -> None:
    before = next(finished.glob("runs/whole/*/3/allocation.json"))
    assert evosweep(*TINY, "sampler=evopress", "name=again", "tracking=none", "storage=memory", "export=none") == 0
    after = next(finished.glob("runs/again/*/allocation.json"))
    assert Allocation.load(after) == Allocation.load(before)


def broken(error: BaseException):
    """Return a ``score`` that works for generation 0 and then does not."""
    score = StagedScorer.score

    def scored(self, genomes, *, generation: int, **place):
        if generation > 0:
            raise error
        return score(self, genomes, generation=generation, **place)

    return scored


@pytest.mark.parametrize(
    ("error", "status", "code"), [(KeyboardInterrupt(), "KILLED", 130), (MemoryError("no more"), "FAILED", None)]
)
def test_what_was_found_is_kept(finished: Path, client: MlflowClient, monkeypatch, error, status: str, code) -> None:
    monkeypatch.setattr(StagedScorer, "score", broken(error))
    name = f"broken_{status}"
    arguments = [*TINY, "sampler=random", f"name={name}"]
    if code is None:
        with pytest.raises(MemoryError):
            evosweep(*arguments)
    else:
        assert evosweep(*arguments) == code
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert run.info.status == status and run.data.tags["reason"]
    assert float(run.data.tags["kl_so_far"]) > 0
    assert client.list_artifacts(run.info.run_id, "generations/0000")
    storage = Journal(path=str(finished / "studies" / f"{name}.journal")).open()
    study = optuna.load_study(study_name=None, storage=storage)
    assert len(study.trials) == 4


def test_an_interrupted_multirun_shows_what_it_has(finished: Path, client: MlflowClient, monkeypatch, capsys) -> None:
    monkeypatch.setattr(StagedScorer, "score", broken(KeyboardInterrupt()))
    assert evosweep("-m", *TINY, "sampler=uniform,random", "name=half") == 130
    shown = capsys.readouterr()
    assert "uniform" in shown.out and "the best allocation so far is kept" in shown.err
    found = client.search_runs([client.get_experiment_by_name("half").experiment_id])
    status = {run.data.params.get("sampler", "parent"): run.info.status for run in found}
    assert status == {"uniform": "FINISHED", "random": "KILLED", "parent": "KILLED"}


def test_the_database_is_mlflows_own(finished: Path) -> None:
    with sqlite3.connect(finished / "mlflow.db") as database:
        tables = {row[0] for row in database.execute("select name from sqlite_master where type='table'")}
    assert {"runs", "metrics", "params"} <= tables
    assert (finished / "mlruns").is_dir()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "drop",
            [
                "compressor=none",
                "drop=sublayers",
                "budget=blocks_kept",
                "budget.blocks_kept=0.6",
                "sampler=evopress,block_influence,leave_one_out,random",
            ],
        ),
        ("mixed", ["drop=sublayers", "sampler=evopress,ilp,owl,uniform"]),
        (
            "sparse",
            [
                "compressor=sparsegpt",
                "budget=sparsity",
                "store.propagate=0.5",
                "sampler=evopress,ilp,owl,uniform,random",
            ],
        ),
        (
            "patterns",
            [
                "compressor=wanda",
                "compressor.patterns=['2:4','4:8']",
                "budget=bits_per_weight",
                "budget.bits_per_weight=13",
                "sampler=evopress,uniform",
            ],
        ),
        (
            "joint",
            [
                "compressor=several",
                "compressor.parts.quantized.group=16",
                "compressor.parts.sparse.group=16",
                "budget=bits_per_weight",
                "budget.bits_per_weight=3.6",
                "export=packed",
                "tracking.model=weights",
                "sampler=evopress,ilp,ilp_bare,owl,uniform",
            ],
        ),
    ],
)
def test_every_kind_of_compression_goes_from_model_to_export(
    finished: Path, client: MlflowClient, name: str, arguments: list[str]
) -> None:
    assert evosweep("-m", *TINY, f"name={name}", "export.jobs=all", *arguments) == 0
    rows = [read_result(path) for path in sorted(finished.glob(f"runs/{name}/*/*/result.json"))]
    assert len(rows) == len(arguments[-1].split(","))
    largest = max(row["bits_per_weight"] for row in rows)
    for row in rows:
        assert row["bits_per_weight"] <= largest and row["kl"] >= 0
        assert row["export"]["max_logit_difference"] < 1e-4
        if name == "sparse":
            assert row["sparsity"] == pytest.approx(0.5, abs=0.03)
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_comparison_says_who_wins_over_seeds(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(in_tmp)
    seeds = ["seed=0,1", "tokens.seed=0"]
    arguments = ["sampler=uniform,evopress", *seeds, "name=duel", "export=none", "storage=memory"]
    assert evosweep("+experiment=[quant_3bit,compare]", *TINY, *arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "within seed noise" in out or "behind" in out or "equal" in out
    client = MlflowClient(tracking_uri=f"sqlite:///{in_tmp / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("duel")
    [parent] = client.search_runs([experiment.experiment_id], "tags.`evosweep.multirun` LIKE 'duel%'")
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "comparison.json")).read_text())
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert {(row["sampler"], row["seeds"]) for row in rows} == {("uniform", 2), ("evopress", 2)}
    assert [row["verdict"] for row in rows].count("best") == 1


def test_experiments_can_be_swept(in_tmp: Path) -> None:
    write_corpus(in_tmp)
    swept = ["+experiment=glob(quant_*)", "sampler=uniform", "export=none", "tracking=none", "storage=memory"]
    assert evosweep("-m", *TINY, *swept) == 0
    found = [read_result(path) for path in in_tmp.glob("runs/evosweep/*/*/result.json")]  # one folder for all jobs
    assert {row["name"] for row in found} == {"quant_3bit", "quant_2.25bit"}
