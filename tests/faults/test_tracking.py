"""MLflow's server goes away, answers slowly or refuses: the search goes on, and everything is delivered in the end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from evosweep.core.results import read_result
from evosweep.tracking.allocation_file import AllocationFile
from evosweep.tracking.mlflow_tracker import tracker
from evosweep.tracking.mlflow_tracker.writes import Series
from tests.cli import TINY, evosweep, workplace
from tests.faults.processes import only_run
from tests.faults.server import Proxy, Server, mlflow_server

GENERATIONS = 4
SEARCH = [*TINY, f"search.generations={GENERATIONS}", "report=none"]
SECRET = "sw0rdfish"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def port(server: Server) -> int:
    return server.port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("tracked")) as folder:
        yield folder


@pytest.fixture
def proxy(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    yield proxy
    proxy.close()


def at_generation(monkeypatch: pytest.MonkeyPatch, generation: int, action) -> None:
    """Do something when the search has a generation."""
    told = AllocationFile.on_event

    def on_event(self, event) -> None:
        told(self, event)
        if getattr(event, "generation", None) == generation:
            action()

    monkeypatch.setattr(AllocationFile, "on_event", on_event)


def searched(proxy: Proxy, name: str) -> int:
    uri = proxy.uri.replace("http://", f"http://me:{SECRET}@")
    return evosweep(*SEARCH, f"name={name}", f"tracking.uri={uri}")


def due(state: list[dict]) -> dict[int, float]:
    """Return the validation figures that are logged, by step: a line that is flat has its ends alone."""
    series = Series()
    points: dict[int, float] = {}
    for line in state:
        for step, values in series.add({"val/kl": line["validation"]["kl"]}, line["generation"]).items():
            points[step] = values["val/kl"]
    return points


def whole(port: int, folder: Path, name: str) -> str:
    """Check that the only run of a name has everything once, in order; return its id."""
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    record = only_run(folder, name)
    state = [json.loads(line) for line in (record / "search_state.jsonl").read_text().splitlines()][1:]
    points = client.get_metric_history(run_id, "val/kl")
    assert {point.step: point.value for point in points} == pytest.approx(due(state))
    assert [point.step for point in points] == sorted(due(state))  # each once
    assert [point.timestamp for point in points] == sorted(point.timestamp for point in points)
    names = {item.path for item in client.list_artifacts(run_id)}
    assert names >= {"config.yaml", "allocation.json", "result.json", "allocation_table.json", "generations", "images"}
    assert len(client.list_artifacts(run_id, "generations")) == GENERATIONS + 1
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    steps = [int(path.split("+step+")[1].split("+")[0]) for path in pictures]
    changes = [now for now in range(1, GENERATIONS + 1) if state[now]["elite"] != state[now - 1]["elite"]]
    assert sorted(steps) == [0, *changes]
    assert run.data.params["sampler"] and run.inputs.dataset_inputs
    assert read_result(record / "result.json")["mlflow_run"] == run_id
    assert json.loads((record / "run.json").read_text())["mlflow_run"] == run_id
    assert not (record / "tracking_unsent.jsonl").exists()
    return run_id


def no_secret(folder: Path, *texts: str) -> None:
    assert not any(SECRET in text for text in texts)
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    assert files and not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("fault", ["drop", 403, "lose"])
def test_a_server_that_fails_in_mid_search_has_everything_in_the_end(
    fault, port: int, folder: Path, proxy: Proxy, monkeypatch, capfd
) -> None:
    name = f"middle_{fault}"
    at_generation(monkeypatch, 1, lambda: setattr(proxy, "mode", fault))
    at_generation(monkeypatch, 3, lambda: setattr(proxy, "mode", "pass"))
    assert searched(proxy, name) == 0
    whole(port, folder, name)
    said = capfd.readouterr()
    no_secret(folder, said.out, said.err)


def test_a_server_that_comes_after_the_start_has_everything_in_the_end(
    port: int, folder: Path, proxy: Proxy, monkeypatch, capfd
) -> None:
    proxy.mode = 500
    at_generation(monkeypatch, 3, lambda: setattr(proxy, "mode", "pass"))
    assert searched(proxy, "late") == 0
    whole(port, folder, "late")
    said = capfd.readouterr()
    assert "does not answer" in said.out + said.err
    no_secret(folder, said.out, said.err)


@pytest.mark.parametrize("fault", [403, 500])
def test_what_a_server_never_took_is_delivered_by_sync(
    fault: int, port: int, folder: Path, proxy: Proxy, monkeypatch, capfd
) -> None:
    name = f"gone_{fault}"
    proxy.mode = fault
    monkeypatch.setattr(tracker, "LAST", 1.0)
    assert searched(proxy, name) == 2
    run = only_run(folder, name)
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert line.endswith(f"to deliver them: evosweep sync {run}") and "Traceback" not in said.err
    no_secret(folder, said.out, said.err)
    assert evosweep("sync", str(run)) == 2
    assert "add tracking.uri=.. with it" in capfd.readouterr().err
    there = f"tracking.uri={proxy.uri}"
    assert evosweep("sync", str(run), there) == 2
    error = capfd.readouterr().err
    assert "does not answer" in error and error.count("\n") == 1
    proxy.mode = "pass"
    assert evosweep("sync", str(run), there) == 0
    run_id = whole(port, folder, name)
    assert f"run {run_id}" in capfd.readouterr().out
    assert evosweep("sync", str(run), there) == 0
    assert "nothing is left to deliver" in capfd.readouterr().out


def test_slow_answers_do_not_slow_the_search(port: int, folder: Path, proxy: Proxy, monkeypatch, capfd) -> None:
    monkeypatch.setattr(tracker, "LAST", 1.0)
    proxy.delay = 10.0
    assert searched(proxy, "slow") == 2
    run = only_run(folder, "slow")
    assert f"evosweep sync {run}" in capfd.readouterr().err
    proxy.delay = 0.0
    assert evosweep("sync", str(run), f"tracking.uri={proxy.uri}") == 0
    whole(port, folder, "slow")


def test_a_server_that_is_killed_and_started_again_has_everything_in_the_end(
    server: Server, folder: Path, proxy: Proxy, monkeypatch, capfd
) -> None:
    at_generation(monkeypatch, 1, server.kill)
    at_generation(monkeypatch, 3, lambda: server.start(wait=False))
    monkeypatch.setattr(tracker, "LAST", 120.0)  # it takes its time to start, here where others compute as well
    assert searched(proxy, "outage") == 0
    whole(server.port, folder, "outage")
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    no_secret(folder, said.out, said.err)


def test_a_multirun_that_a_server_never_took_is_delivered_whole(
    port: int, folder: Path, proxy: Proxy, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(tracker, "LAST", 1.0)
    proxy.mode = 500
    uri = proxy.uri.replace("http://", f"http://me:{SECRET}@")
    settings = ["search.generations=1", "export=none", "name=multi", f"tracking.uri={uri}"]
    assert evosweep("-m", *SEARCH, *settings, "seed=0,1") == 2
    (top,) = folder.glob("runs/multi/*")
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    jobs = [f"evosweep sync {top / str(number)} (job {number + 1} of 2)" for number in range(2)]
    assert sorted(line.partition("deliver them: ")[2] for line in errors[:2]) == jobs
    assert len(errors) == 3 and errors[2].endswith(f"to deliver it: evosweep sync {top}")
    proxy.mode = "pass"
    assert evosweep("sync", str(top), f"tracking.uri={proxy.uri}") == 0
    assert not list(top.rglob("tracking_unsent.jsonl"))
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    runs = client.search_runs([client.get_experiment_by_name("multi").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3 and len(children) == 2
    assert {run.info.status for run in children} == {"FINISHED"} and parent.info.status == "FAILED"
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} >= {"summary.json", "comparison.json"}
