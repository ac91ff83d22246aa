import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service import utils as tracking_service

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import GenerationRecord, SearchEnded, SearchResult, SearchStarted, StageRecord
from evosweep.core.problem import Problem
from evosweep.tracking.mlflow_tracker import MlflowTracker, store, view
from evosweep.tracking.mlflow_tracker.figures import generation_figures
from evosweep.tracking.mlflow_tracker.outbox import Outbox
from evosweep.tracking.mlflow_tracker.writes import Series, rounded


def test_an_uri_that_is_none_is_one_line() -> None:
    tracker = MlflowTracker(experiment="x", uri="nonsense://here")
    with pytest.raises(SettingError, match=r"uri") as caught:
        tracker.start("x", params={}, tags={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", ["", None, 3])
def test_experiments_have_names(experiment) -> None:
    with pytest.raises(SettingError, match=r"experiment"):
        MlflowTracker(experiment=experiment)


def test_closing_what_never_began_does_nothing(in_tmp) -> None:
    MlflowTracker(experiment="x").close("FAILED", reason="before the start")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("uri", ["./runs", "file:./runs", "sqlite:////proc/nowhere/mlflow.db"])
def test_where_no_runs_can_be_kept_is_one_line(uri: str, in_tmp) -> None:
    with pytest.raises(SettingError, match=r"uri must be an MLflow tracking URI that can be w") as caught:
        MlflowTracker(experiment="x", uri=uri).start("x", params={}, tags={})
    assert "\n" not in str(caught.value)


def test_an_experiment_that_was_deleted_says_how_to_have_it_back(in_tmp) -> None:
    tracker = MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp}/mlflow.db", system_metrics=False)
    found = tracker.client.create_experiment("x", artifact_location=str(in_tmp / "artifacts"))
    tracker.client.delete_experiment(found)
    with pytest.raises(EvosweepError, match=f"was deleted: choose another name=.* --experiment-id {found}"):
        tracker.start("x", params={}, tags={})


def test_a_database_of_another_version_or_program_says_what_to_do(in_tmp) -> None:
    MlflowClient(tracking_uri="sqlite:///newer.db").create_experiment("x")
    with sqlite3.connect("newer.db") as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    optuna.create_study(storage="sqlite:///optuna.db")
    for name in ("newer.db", "optuna.db"):
        with pytest.raises(SettingError, match=r"uri .*mlflow db upgrade, or name a new file") as caught:
            MlflowTracker(experiment="y", uri=f"sqlite:///{in_tmp / name}").start("x", params={}, tags={})
        assert "\n" not in str(caught.value)


def test_a_journal_of_optuna_s_is_no_database(in_tmp) -> None:
    (in_tmp / "x.journal").write_text('{"op_code": 0}\n' * 99)
    with pytest.raises(SettingError, match=r"uri .*file is not a database"):
        MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp / 'x.journal'}").start("x", params={}, tags={})


@pytest.fixture
def tracker(in_tmp) -> MlflowTracker:
    return MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp / 'mlflow.db'}", system_metrics=False)


@pytest.mark.parametrize("multirun", [None, "many"])
def test_a_run_that_the_environment_names_is_gone_on_with(tracker: MlflowTracker, monkeypatch, multirun) -> None:
    given = tracker.client.create_run(tracker.client.create_experiment("x")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    opened = tracker.start("x", params={"sampler": "ilp"}, tags={"a": "b"}, multirun=multirun)
    run = tracker.client.get_run(opened)
    assert run.data.params == {"sampler": "ilp"} and run.data.tags["a"] == "b"
    assert (opened == given) == (multirun is None)
    assert run.data.tags.get("mlflow.parentRunId") == (given if multirun else None)


def test_a_param_that_the_named_run_has_already_stays_and_the_run_is_closed(
    tracker: MlflowTracker, monkeypatch
) -> None:
    given = tracker.client.create_run(tracker.client.create_experiment("x")).info.run_id
    tracker.client.log_param(given, "sampler", "mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tracker.start("x", params={"sampler": "ilp", "seed": "0"}, tags={})
    tracker.close("FINISHED")
    run = tracker.client.get_run(given)
    assert run.data.params == {"sampler": "mine", "seed": "0"} and run.info.status == "FINISHED"


@pytest.mark.parametrize("multirun", [None, "many"])
def test_a_run_that_is_over_or_unknown_is_not_gone_on_with(tracker: MlflowTracker, monkeypatch, multirun) -> None:
    given = tracker.client.create_run(tracker.client.create_experiment("x")).info.run_id
    tracker.client.set_terminated(given)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with pytest.raises(SettingError, match=r"MLFLOW_RUN_ID must be a run that is not over, got .* unset MLFLOW_RUN_ID"):
        tracker.start("x", params={}, tags={}, multirun=multirun)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    with pytest.raises(SettingError, match="MLFLOW_RUN_ID must be a run of this store"):
        tracker.start("x", params={}, tags={}, multirun=multirun)
    assert len(tracker.client.search_runs(["1"])) == 1


def test_an_experiment_that_was_there_gets_our_view_and_keeps_its_own_tags(tracker: MlflowTracker) -> None:
    made = tracker.client.create_experiment("x", tags={"mlflow.experimentKind": "genai_development", "mine": "1"})
    tracker.start("x", params={}, tags={})
    tags = tracker.client.get_experiment(made).tags
    assert tags["mlflow.experimentKind"] == "genai_development" and tags["mine"] == "1"
    assert "metrics.`kl`" in tags["mlflow.sharedViewState.evosweep"]
    assert "Validation never selects" in tags["mlflow.note.content"]


def test_params_that_a_given_run_has_stay_as_they_are(tracker: MlflowTracker, monkeypatch) -> None:
    given = tracker.client.create_run(tracker.client.create_experiment("x")).info.run_id
    tracker.client.log_param(given, "seed", "7")
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tracker.start("x", params={"seed": "0", "sampler": "ilp"}, tags={})
    tracker.close("FINISHED")
    run = tracker.client.get_run(given)
    assert run.data.params == {"seed": "7", "sampler": "ilp"} and run.info.status == "FINISHED" and not tracker.missing


def record(generation: int, kl: float, problem: Problem, **more) -> GenerationRecord:
    values = {
        "stages": (),
        "candidates": (),
        "validation": {"kl": kl, "ppl": 10 * kl},
        "tokens": 100 * generation,
        "tokens_per_second": 5.0,
        "changed": generation,
        "seconds": 1.0,
        "elapsed": 1.0,
    }
    elite = problem.uniform()
    return GenerationRecord(
        generation=generation,
        elite=problem.decode(elite),
        elite_slot=0,
        cost=problem.cost(elite),
        bits_per_weight=3.0,
        **values | more,
    )


def events(problem: Problem, generations: int = 3) -> list:
    records = tuple(record(index, 0.5 - 0.1 * index, problem) for index in range(generations))
    result = SearchResult(
        sampler="evopress",
        seed=0,
        allocation=records[-1].elite,
        problem=problem,
        generations=records,
        validation={"kl": 0.300049, "ppl": float("inf")},
        dense={"kl": 0.0, "ppl": 3.0},
        tokens=200,
        seconds=1.23456,
    )
    return [SearchStarted("x", problem, 0, {}), *records, SearchEnded(result)]


def test_lines_vary_and_results_are_rounded_bars(tracker: MlflowTracker, problem: Problem) -> None:
    run = tracker.start("x", params={}, tags={})
    for event in events(problem):
        tracker.on_event(event)
    tracker.close("FINISHED")
    found = tracker.client.get_run(run).data.metrics
    assert found["kl"] == 0.3 and found["seconds"] == 1.235 and "ppl" not in found  # infinite
    history = {key: tracker.client.get_metric_history(run, key) for key in found}
    assert [point.value for point in history["val/kl"]] == pytest.approx([0.5, 0.4, 0.3])
    assert {key for key in history if "/" in key} == {"val/kl", "val/ppl", "search/tokens", "search/units_changed"}
    assert all(len({point.value for point in points}) > 1 for key, points in history.items() if "/" in key)
    assert all([point.step for point in points] == [0] for key, points in history.items() if "/" not in key)


def test_a_series_that_changes_late_is_flat_until_then() -> None:
    series = Series()
    assert series.add({"a": 1.0}, 0) == series.add({"a": 1.0}, 1) == series.add({"a": 1.0}, 2) == {}
    assert series.add({"a": 2.0}, 3) == {0: {"a": 1.0}, 2: {"a": 1.0}, 3: {"a": 2.0}}
    assert series.add({"a": 2.0}, 4) == {4: {"a": 2.0}}


@pytest.mark.parametrize(
    ("value", "shown"), [(0.687312, 0.6873), (23.4567, 23.46), (12345.67, 12346.0), (0.00123456, 0.001235), (0.0, 0.0)]
)
def test_figures_have_the_digits_that_a_table_can_show(value: float, shown: float) -> None:
    assert rounded(value) == shown


def test_stages_are_gains_on_the_same_tokens(problem: Problem) -> None:
    stages = (StageRecord(8, 64, 1.0, 1.25, 2.0), StageRecord(3, 128, 0.75, 0.8, 1.0, parent=0.875))
    figures = generation_figures(record(1, 0.5, problem, stages=stages))
    assert figures["stages/0_gain_over_median"] == 0.25 and figures["stages/1_gain_over_parent"] == 0.125


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_server_that_is_not_there_is_one_line_and_no_error(in_tmp) -> None:
    tracker = MlflowTracker(experiment="x", uri=f"http://me:secret@127.0.0.1:{closed_port()}")
    tracker.check()
    assert tracker.away.endswith("does not answer: nothing listens there")
    assert "secret" not in tracker.away and "\n" not in tracker.away
    assert tracker.start("x", params={"a": "b"}, tags={}, folder=in_tmp) is None and tracker.link is None
    kinds = [json.loads(line)["kind"] for line in (in_tmp / "tracking_unsent.jsonl").read_text().splitlines()]
    assert kinds == ["open", "params"]
    tracker.close("KILLED")
    assert f"to deliver them: evosweep sync {in_tmp}" in tracker.missing and "secret" not in tracker.missing


def test_a_server_that_never_answers_is_waited_for_in_bounds(in_tmp) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(64)
        tracker = MlflowTracker(experiment="x", uri=f"http://127.0.0.1:{hole.getsockname()[1]}")
        tracker.check()
        assert tracker.away.endswith("does not answer: no answer within 3 s")


class Failing:
    """A real client that stops working; what is written while it does not work must not be lost."""

    def __init__(self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken = False
        for name in ("log_batch", "log_text", "log_image", "log_artifacts", "set_terminated"):
            monkeypatch.setattr(client, name, self._maybe(getattr(client, name)))

    def _maybe(self, real):
        def called(*args, **named):
            if self.broken:
                raise MlflowException("API request to http://me:secret@host failed: 503")
            return real(*args, **named)

        return called


def test_a_server_that_comes_back_gets_everything(tracker: MlflowTracker, problem: Problem, monkeypatch) -> None:
    run = tracker.start("x", params={}, tags={})
    server = Failing(tracker.client, monkeypatch)
    start, *records, end = events(problem)
    tracker.on_event(start)
    server.broken = True
    for event in records:
        tracker.on_event(event)
    server.broken = False
    tracker.on_event(end)
    tracker.close("FINISHED")
    assert not tracker.missing and tracker.client.get_run(run).info.status == "FINISHED"
    assert [point.step for point in tracker.client.get_metric_history(run, "val/kl")] == [0, 1, 2]


def test_a_server_that_stays_away_costs_neither_the_search_nor_the_figures(
    tracker: MlflowTracker, problem: Problem, monkeypatch, in_tmp
) -> None:
    tracker.start("x", params={}, tags={}, folder=in_tmp)
    server = Failing(tracker.client, monkeypatch)
    server.broken = True
    began = time.monotonic()
    for event in events(problem, generations=5):
        tracker.on_event(event)
    assert time.monotonic() - began < 5
    monkeypatch.setattr(tracker._outbox, "flush", lambda _, **how: Outbox.flush(tracker._outbox, 0.2, **how))
    tracker.close("FINISHED")
    assert "did not take" in tracker.missing and "tracking_unsent.jsonl" in tracker.missing
    assert "secret" not in tracker.missing and "\n" not in tracker.missing
    lines = [json.loads(line) for line in (in_tmp / "tracking_unsent.jsonl").read_text().splitlines()]
    figures = [line["content"]["values"] for line in lines if line["kind"] == "metrics"]
    kept = [values["val/kl"] for values in figures if "val/kl" in values]
    assert kept == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert [(line["kind"], line["run"]) for line in lines[-2:]] == [("end", tracker.run_id), ("table", tracker.run_id)]
    assert lines[-2]["content"]["status"] == "FINISHED"


def test_a_database_is_whole_or_not_there(in_tmp) -> None:
    code = (
        "from evosweep.tracking.mlflow_tracker import MlflowTracker\n"
        "MlflowTracker(experiment='x', uri='sqlite:///mlflow.db').check()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    for _ in range(600):
        if list(in_tmp.glob(".mlflow.db.*.new")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (in_tmp / "mlflow.db").exists()
    MlflowTracker(experiment="x", uri="sqlite:///mlflow.db").check()
    assert not list(in_tmp.glob(".mlflow.db.*.new*")) and (in_tmp / "mlflow.db").is_file()
    assert MlflowClient(tracking_uri="sqlite:///mlflow.db").get_experiment_by_name("x")


def test_a_lock_that_another_process_holds_is_one_line(in_tmp, monkeypatch) -> None:
    monkeypatch.setattr(store, "LOCK", 0.1)
    with FileLock(in_tmp / ".mlflow.db.lock"), pytest.raises(SettingError, match=r"has been held for 0.1 s: end that"):
        MlflowTracker(experiment="x", uri=f"sqlite:///{in_tmp}/mlflow.db").check()


@pytest.mark.parametrize(
    ("uri", "link", "command"),
    [
        (None, "http://127.0.0.1:5000/#/experiments/1/", "mlflow ui"),
        ("sqlite:///b.db", "http://127.0.0.1:5000/#/experiments/1/", "mlflow ui --backend-store-uri sqlite:///b.db"),
    ],
)
@pytest.mark.parametrize("by", ["setting", "environment"])
def test_the_link_is_right_for_the_store(uri, link: str, command: str, by: str, in_tmp, monkeypatch) -> None:
    monkeypatch.setattr(tracking_service, "_tracking_uri", None)  # MLflow's setter would pin it for later tests
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri and by == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = MlflowTracker(experiment="x", uri=uri if by == "setting" else None)
    tracker.check()
    assert tracker.link == f"{link}runs?viewStateShareKey=evosweep&workflowType=machine_learning"
    assert tracker.command == command


def test_a_server_s_link_holds_no_credentials() -> None:
    assert view.link("https://me:secret@host:5000/", "7").startswith("https://host:5000/#/experiments/7/runs?")
    assert MlflowTracker(experiment="x", uri="https://me:secret@host:5000/").command == ""


@pytest.mark.parametrize("uri", [5, "", ["a"]])
def test_uris_are_text(uri) -> None:
    with pytest.raises(SettingError, match="uri must be an MLflow tracking URI, or null for MLflow's default"):
        MlflowTracker(experiment="x", uri=uri)


def test_a_parent_carries_the_best_and_what_is_shared(tracker: MlflowTracker, in_tmp) -> None:
    ids = {}
    for sampler, kl in (("ilp", 0.2), ("evopress", 0.3)):  # named by search tokens, not by the lowest validation KL
        job = MlflowTracker(experiment="x", uri=tracker.uri)
        job.start(f"m {sampler}", params={"sampler": sampler, "model": "m"}, tags={}, multirun="many")
        job.metrics({"kl": kl, "ppl": 9.0, "size_mb": 1.5})
        job.close("FINISHED")
        ids[sampler] = str(job.run_id)
    best = [ids["evopress"], ids["ilp"]]
    tracker.summarize("many", status="FINISHED", files=[], note="| table |", best=best)
    (parent,) = tracker.client.search_runs(["1"], "tags.`evosweep.multirun` = 'many'")
    assert parent.data.metrics == {"kl": 0.3, "ppl": 9.0, "size_mb": 1.5} and parent.data.params == {"model": "m"}
    assert parent.info.run_name == "best of 2: m evopress" and parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"] == "Best: **m evopress**, kl 0.3.\n\n| table |"
    state = json.loads(tracker.client.get_experiment("1").tags["mlflow.sharedViewState.evosweep"])
    assert state["selectedColumns"] == ["metrics.`kl`", "metrics.`ppl`", "params.`sampler`"]
