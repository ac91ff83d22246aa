"""A run that was killed or stopped goes on as the same run: same allocation, same MLflow run, same study."""

import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cli import TINY, evosweep, workplace
from tests.faults.processes import PATIENCE, kill, lines, logged, only_run, outcome, start, trials, wait_for

GENERATIONS = 12
GATED = ["scorer._target_=tests.faults.slow_scorer.SlowScorer"]
SEARCH = [*TINY, f"search.generations={GENERATIONS}", "sampler=evopress_ilp_scaled", "search.final=true", "report=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("faults")) as folder:
        assert evosweep(*SEARCH, "name=whole") == 0
        yield folder


def gated(folder: Path, *, before: int) -> list[str]:
    """Return settings of a search that waits before it scores a generation, until the gate is opened."""
    (folder / "gate.txt").unlink(missing_ok=True)
    return [*GATED, "+scorer.gate=gate.txt", f"+scorer.gate_from={before}"]


def open_gate(folder: Path) -> None:
    (folder / "gate.txt").touch()


def same_as_whole(folder: Path, name: str) -> None:
    assert outcome(only_run(folder, name)) == outcome(only_run(folder, "whole"))
    (status,), steps = logged(folder, name)
    assert status == "FINISHED"
    assert steps == logged(folder, "whole")[1]
    assert trials(folder, name) == trials(folder, "whole")


@pytest.mark.parametrize("moment", ["before the first generation", "in mid-search", "after the last generation"])
def test_a_killed_run_goes_on_to_what_it_would_have_found(folder: Path, moment: str) -> None:
    name = f"killed_{moment.split(maxsplit=1)[0]}_{moment.rsplit(maxsplit=1)[-1]}"
    wanted = {"before": 0, "in": 5, "after": GENERATIONS + 2}[moment.split(maxsplit=1)[0]]
    command = [*SEARCH, *gated(folder, before=wanted - 1), f"name={name}"]
    process = start(folder, *command)
    state = "runs/{}/*/{}".format(name, "{}")

    def now() -> bool:
        if not wanted:
            return any(folder.glob(state.format("run.json")))
        return any(lines(path) >= wanted for path in folder.glob(state.format("search_state.jsonl")))

    assert wait_for(now, process)
    kill(process)
    open_gate(folder)
    assert evosweep(*command, "resume=auto") == 0
    same_as_whole(folder, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_finishes_the_generation_and_says_how_to_go_on(folder: Path, number: int) -> None:
    name = f"stopped_{int(number)}"
    process = start(folder, *SEARCH, *gated(folder, before=2), f"name={name}")
    assert wait_for(lambda: any(lines(path) > 2 for path in folder.glob(f"runs/{name}/*/search_state.jsonl")), process)
    process.send_signal(number)
    open_gate(folder)
    _, error = process.communicate(timeout=PATIENCE)
    run = only_run(folder, name)
    assert process.returncode == 143
    assert error.strip().endswith(f"to go on: evosweep resume {run}")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert tracked.info.status == "KILLED" and tracked.data.tags["resume"] == f"evosweep resume {run}"
    assert evosweep("resume", str(run)) == 0
    same_as_whole(folder, name)


def test_a_run_left_running_is_closed_by_the_next_start(folder: Path) -> None:
    gate = gated(folder, before=2)
    process = start(folder, *SEARCH, *gate, "name=left")
    assert wait_for(lambda: any(folder.glob("runs/left/*/search_state.jsonl")), process)
    kill(process)
    open_gate(folder)
    assert evosweep(*SEARCH, *gate, "name=left", "seed=1", "search.generations=0") == 0
    statuses, _ = logged(folder, "left")
    assert sorted(statuses) == ["FINISHED", "KILLED"]
    assert evosweep(*SEARCH, *gate, "name=left", "resume=auto") == 0  # the other seed is another run
    assert sorted(logged(folder, "left")[0]) == ["FINISHED", "FINISHED"]


def test_a_finished_search_is_made_longer_as_the_same_run(folder: Path) -> None:
    assert evosweep(*SEARCH, "name=longer", "search.generations=5") == 0
    run = only_run(folder, "longer")
    assert evosweep("resume", str(run), f"search.generations={GENERATIONS}") == 0
    assert outcome(run) == outcome(only_run(folder, "whole"))
    (status,), steps = logged(folder, "longer")
    assert status == "FINISHED" and steps["val/kl"] == logged(folder, "whole")[1]["val/kl"]


def test_a_multirun_goes_on_with_what_is_left(folder: Path) -> None:
    swept = [*SEARCH, "name=many", "seed=0,1", "sampler=uniform,evopress_ilp_scaled"]
    process = start(folder, "-m", *swept)
    assert wait_for(lambda: any(lines(path) > 3 for path in folder.glob("runs/many/*/3/search_state.jsonl")), process)
    kill(process)
    before = (next(folder.glob("runs/many/*/0/result.json"))).stat().st_mtime_ns
    assert evosweep("-m", *swept, "resume=auto") == 0
    found = sorted(folder.glob("runs/many/*/*/result.json"))
    assert len(found) == 4 and len({path.parents[1] for path in found}) == 1
    assert found[0].stat().st_mtime_ns == before  # it was done, and is not done again
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("many").experiment_id])
    assert len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=nowhere"], "resume must be the folder of a run or the id of its MLflow run, got 'nowhere'"),
        (["resume={whole}"], "nothing is left to resume, unless search.generations is raised above 12"),
        (["resume={whole}", "budget.as_uniform=4"], "budget.as_uniform is 3 there and 4 now"),
        (["resume={whole}", "seed=3"], "seed is 0 there and 3 now"),
        (["resume=3"], "resume must be null, auto, a run's folder or the id of its MLflow run, got 3"),
        (["resume=" + "0" * 32], "MLflow has no run"),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_line(folder: Path, capsys, arguments: list[str], message: str) -> None:
    whole = str(only_run(folder, "whole"))
    assert evosweep(*SEARCH, "name=whole", *(text.format(whole=whole) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
