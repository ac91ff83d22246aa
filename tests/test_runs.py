"""Runs and multiruns as they are started: folders of their own, signals, what a multirun shows and exports."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from evosweep.cli.folders import CLAIM, claim
from evosweep.core.errors import SettingError
from evosweep.core.redact import redact
from evosweep.core.results import read_result, write_result
from tests.cli import TINY, evosweep, workplace

BARE = ["tracking=none", "storage=memory", "export=none", "report=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("runs")) as folder:
        yield folder


def rows(folder: Path) -> list[dict]:
    return [read_result(path) for path in sorted(folder.rglob("result.json"))]


def test_runs_of_one_second_have_a_folder_each(tmp_path: Path) -> None:
    made = [claim(tmp_path / "second", setting="hydra.run.dir") for _ in range(3)]
    assert [path.name for path in made] == ["second", "second-2", "second-3"]
    assert all((path / CLAIM).is_file() for path in made)
    (tmp_path / "mine").mkdir()
    assert claim(tmp_path / "mine", setting="hydra.run.dir") == tmp_path / "mine"  # it holds no run


def test_two_commands_at_once_in_one_folder_lose_nothing(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "evosweep", *TINY, *BARE, "sampler=uniform", "hydra.run.dir=same"]
    started = [subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [each.wait(timeout=300) for each in started] == [0, 0]
    assert (folder / "same" / "result.json").is_file() and (folder / "same-2" / "result.json").is_file()


@pytest.mark.parametrize("where", ["hydra.run.dir=.", "hydra.job.chdir=true"])
def test_a_run_may_be_where_it_is_started(folder: Path, monkeypatch, tmp_path, capsys, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"data.path={folder / 'corpus.jsonl'}"
    (tmp_path / "mlruns" / "artifacts").mkdir(parents=True)
    (tmp_path / "mlruns" / "artifacts" / "result.json").write_text("{}")  # MLflow keeps one of that name
    assert evosweep(*TINY, text, "sampler=uniform", "export=none", "report=none", where) == 0
    out = capsys.readouterr().out
    assert "uniform" in out and "not exported: python -m evosweep export" in out


def test_sigterm_closes_the_run_as_killed(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [*TINY, "search.generations=100000", "name=stopped", "export=none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evosweep", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/stopped/*/search_state.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert error.strip().startswith("interrupted; the best allocation so far is kept in ") and error.count("\n") == 1
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("stopped").experiment_id])
    assert run.info.status == "KILLED"


def test_experiments_that_name_themselves_are_compared_and_their_parents_closed(folder: Path, capsys) -> None:
    swept = ["+experiment=glob(quant_*)", "sampler=uniform,ilp", "storage=memory", "report=none"]
    assert evosweep("-m", *TINY, *swept) == 0
    out = capsys.readouterr().out
    found = rows(folder / "runs" / "evosweep")
    assert len(found) == 4 and len({row["identity"] for row in found}) == 4
    assert "[job 1/4]" in out and "experiment=" in out and "mlflow ui" in out and "never selects" in out
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    for name in ("quant_3bit", "quant_2.25bit"):
        runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        assert len(runs) == 3 and {run.info.status for run in runs} == {"FINISHED"}
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert "summary.json" in {item.path for item in client.list_artifacts(parent.info.run_id)}


@pytest.fixture(scope="module")
def winners(folder: Path) -> tuple[list[dict], str]:
    """Returns the results and the closing words of a multirun over two samplers and two budgets."""
    arguments = ["sampler=uniform,ilp", "budget.as_uniform=3,4", "storage=memory", "report=none"]
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        assert evosweep("-m", *TINY, *arguments, "name=winners") == 0
    return rows(folder / "runs" / "winners"), words.getvalue()


def test_a_multirun_exports_the_best_job_of_each_budget(folder: Path, winners: tuple[list[dict], str]) -> None:
    found, out = winners
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    for budget in ("as_uniform=3", "as_uniform=4"):
        mine = [row for row in found if row["budget"] == budget]
        best = min(mine, key=lambda row: row["kl"])
        assert [bool(row["export"]) for row in mine] == [row is best for row in mine]
        assert (Path(best["folder"]) / "model" / "packed.json").is_file()
        for row in mine:
            run = client.get_run(row["mlflow_run"])
            assert run.data.tags.get("export.path") == row["export"].get("path") and run.info.status == "FINISHED"
    assert out.count("MB on disk") == 2 and out.count("model = load_packed('") == 2


def test_identity_leaves_out_what_changes_no_figure(folder: Path, winners: tuple[list[dict], str]) -> None:
    same, _ = winners
    assert evosweep(*TINY, *BARE, "sampler=uniform", "seed=5", "name=repeated") == 0
    (again,) = rows(folder / "runs" / "repeated")
    (first,) = [row for row in same if row["sampler"] == "uniform" and row["budget"] == "as_uniform=3"]
    assert again["identity"] == first["identity"]
    assert len({row["identity"] for row in same}) == 4


def test_a_budget_typed_alone_implies_its_kind_and_too_large_a_one_is_said(folder: Path, capsys) -> None:
    assert evosweep(*TINY, *BARE, "sampler=uniform", "budget.megabytes=100", "name=large") == 0
    assert "the budget megabytes=100 allows every unit its largest level" in " ".join(capsys.readouterr().out.split())
    (row,) = rows(folder / "runs" / "large")
    assert row["budget"] == "megabytes=100" and row["bits_per_weight"] == pytest.approx(6.34375)


def test_failures_of_a_multirun_come_together_at_its_end(folder: Path, capsys) -> None:
    assert evosweep("-m", *TINY, *BARE, "sampler=uniform", "budget.as_uniform=3,9,3bit,99", "name=some") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and errors[0].endswith("(job 2 of 4)") and errors[1].endswith("(job 4 of 4)")
    assert len(rows(folder / "runs" / "some")) == 2


def test_a_run_has_a_log_and_a_versioned_result(folder: Path) -> None:
    assert evosweep(*TINY, "sampler=uniform", "name=logged", "tracking=none", "export=none") == 0
    run = next(folder.glob("runs/logged/*"))
    log = (run / "run.log").read_text()
    assert "python -m evosweep model=tiny" in log and "generation 0, val KL" in log
    result = json.loads((run / "result.json").read_text())
    assert result["version"] == 2 and {"kl", "ppl", "size_mb", "bits_per_weight"} <= result["metrics"].keys()
    assert "validation never selects" in result["selected_by"]


def test_infinite_figures_are_json(tmp_path: Path) -> None:
    write_result(tmp_path, {"kl": 1.5, "ppl": float("inf"), "run": "x"})
    assert json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)["metrics"]["ppl"] is None
    assert read_result(tmp_path / "result.json")["ppl"] == float("inf")


def test_credentials_are_kept_nowhere(folder: Path, capsys) -> None:
    secret = "tracking.uri=sqlite://someone:hunter2@/mlflow.db"
    code = evosweep(*TINY, "sampler=uniform", "name=secret", "storage=memory", "export=none", secret)
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err and code in (0, 2)
    for path in folder.glob("runs/secret/**/*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


def test_redacted() -> None:
    assert redact("x http://user:se:cr@et@host/p y") == "x http://user:***@host/p y"
    assert redact({"a": ["https://token@host", 5]}) == {"a": ["https://***@host", 5]}
    assert redact("mail me@here and sqlite:///a.db") == "mail me@here and sqlite:///a.db"


def test_a_name_with_an_equals_sign_can_be_quoted(folder: Path) -> None:
    (folder / "epoch=3.jsonl").write_bytes((folder / "corpus.jsonl").read_bytes())
    assert evosweep(*TINY, *BARE, "sampler=uniform", "name=quoted", 'data.path="epoch=3.jsonl"') == 0
    assert yaml.safe_load(next(folder.glob("runs/quoted/*/config.yaml")).read_text())["data"]["path"] == "epoch=3.jsonl"


def test_what_cannot_be_written_is_said_before_any_work(folder: Path, capsys) -> None:
    (folder / "a_file").write_text("")
    for setting in ("storage.path=a_file/x.journal", "storage.artifacts=a_file", "hydra.run.dir=a_file/x"):
        assert evosweep(*TINY, "tracking=none", setting) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {setting.split('=')[0]} must be") and error.count("\n") == 1
    with pytest.raises(SettingError, match="can be written"):
        claim(Path("/proc/nowhere/x"), setting="hydra.run.dir")


def test_without_arguments_it_says_what_it_would_do(capsys) -> None:
    assert evosweep() == 0
    out = capsys.readouterr().out
    assert "+experiment=quickstart" in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("typo", ["+search.typo=1", "search.ofspring=4", "+compressor.grup=8", "smapler=ilp"])
def test_a_typo_loads_no_torch(folder: Path, typo: str) -> None:
    code = (
        f"import sys; sys.argv = ['evosweep', {typo!r}]\n"
        "from evosweep.cli.main import main\n"
        "try: main()\nexcept SystemExit: print([n for n in ('torch', 'transformers', 'mlflow') if n in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stderr
