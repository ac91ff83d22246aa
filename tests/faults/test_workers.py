"""Several processes score one search: the result of one, nothing scored twice, nothing lost with a process."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from evosweep.search.sharing import RUNNING, Entry
from evosweep.tracking.study.database import Database
from evosweep.tracking.study.storage import Journal
from evosweep.tracking.study.work import SUFFIX, StudyQueue
from tests.cli import TINY, evosweep, workplace
from tests.faults.processes import lines, only_run, outcome
from tests.tracking.test_database import url  # noqa: F401 - a fixture

GENERATIONS = 3
SEARCH = [
    *TINY,
    f"search.generations={GENERATIONS}",
    "search.offspring=8",
    "tracking=none",
    "export=none",
    "report=none",
    "storage.artifacts=null",
    "scorer._target_=tests.faults.slow_scorer.SlowScorer",
    "+scorer.seconds=0.02",
    "+scorer.log=scored.txt",
]
SHARED = ["workers.parts=4", "workers.lease=4"]
FOREVER = "scorer.seconds=1000"
GATE = "gate.txt"
HELD = [f"+scorer.gate={GATE}", "+scorer.gate_from=1"]  # the start is scored, and nothing more before the gate opens
FORK = multiprocessing.get_context("fork")  # a process of its own, without a second import of torch
PATIENCE = 120.0
Process = Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place with one search that one process did alone; its workbench is there for all that are forked."""
    with workplace(tmp_path_factory.mktemp("workers")) as folder:
        assert evosweep(*SEARCH, "name=alone") == 0
        yield folder


@pytest.fixture
def processes(folder: Path) -> Iterator[Callable[..., Process]]:
    """Start commands as processes; all are ended with the test."""
    for name in ("scored.txt", GATE):
        (folder / name).unlink(missing_ok=True)
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        process = FORK.Process(target=run, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def run(*arguments: str) -> None:
    os._exit(evosweep(*arguments))


def serve_proxy(where: str, port: int) -> None:
    optuna.storages.run_grpc_proxy_server(Database(url=where).open(), host="127.0.0.1", port=port)


@pytest.fixture(params=["journal", "database", "grpc"])
def storage(request: pytest.FixtureRequest) -> Iterator[tuple[list[str], Callable[[str], Any]]]:
    """The settings of a storage, and how this process opens it for a search of some name."""
    if request.param == "journal":
        yield [], lambda name: Journal(path=f"studies/{name}.journal").open()
        return
    where = request.getfixturevalue("url")
    opened = Database(url=where).open()
    if request.param == "database":
        yield ["storage=database", f"storage.url={where}"], lambda name: opened
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = FORK.Process(target=serve_proxy, args=(where, port))
    server.start()
    yield ["storage=grpc", "storage.host=127.0.0.1", f"storage.port={port}"], lambda name: opened
    server.kill()
    server.join()


def until(condition: Callable[[], Any]) -> Any:
    """Return the first true value of a condition."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not become true")


def begun(folder: Path, name: str) -> Path:
    """Return the folder of a search as soon as it is there."""
    return until(lambda: next((path.parent for path in folder.glob(f"runs/{name}/*/config.yaml")), None))


def queue_of(opened: Any) -> StudyQueue | None:
    """Return the queue of the only search that a storage shares, once it is described."""
    shared = [name for name in optuna.get_all_study_names(opened) if name.endswith(SUFFIX)]
    if not shared:
        return None
    queue = StudyQueue(storage=opened, study=shared[0].removesuffix(SUFFIX))
    return queue if queue.search else None


def journal_queue(name: str) -> StudyQueue:
    """Return the queue of the search in a journal, as soon as it is described."""
    path = Path(f"studies/{name}.journal")
    opened = until(lambda: path.is_file() and Journal(path=str(path)).open())
    return until(lambda: queue_of(opened))


def open_gate() -> None:
    Path(GATE).touch()


def held_by(queue: StudyQueue, process: Process) -> Entry | None:
    """Return the part that a process scores."""
    holders = (f"{socket.gethostname()}-{process.pid}",)
    return next((e for e in queue.unfinished() if e.state == RUNNING and e.holder in holders), None)


def ended(*started: Process) -> list[int | None]:
    for process in started:
        process.join(PATIENCE)
    return [process.exitcode for process in started]


def scored(folder: Path) -> list[tuple[tuple[str, ...], int]]:
    """Return generation, stage and levels of every candidate that was scored, and by which process."""
    lines = (folder / "scored.txt").read_text(encoding="utf-8").splitlines()
    return [(tuple(line.split()[:3]), int(line.split()[3])) for line in lines]


def scorers(folder: Path) -> set[int]:
    return {process for _, process in scored(folder)}


def expected(run: Path) -> set[tuple[str, str]]:
    """Return every generation and stage that a search's candidates were scored in, with how often."""
    state = [json.loads(line) for line in (run / "search_state.jsonl").read_text().splitlines()][1:]
    return {(str(g["generation"]), stage) for g in state for scores in g["candidates"]["scores"] for stage in scores}


def same_as_alone(folder: Path, name: str, *, killed: int = -1) -> None:
    """Check a result, and that each candidate was scored once.

    What ``killed`` has scored but not yet written when it was killed is lost with it: one part of two candidates.
    """
    alone, shared = only_run(folder, "alone"), only_run(folder, name)
    assert outcome(shared) == outcome(alone)
    by_others = Counter(what for what, process in scored(folder) if process != killed)
    by_killed = Counter(what for what, process in scored(folder) if process == killed)
    assert not [what for what, count in (by_others | by_killed).items() if count > 1]
    assert len(by_others & by_killed) <= 2
    assert {what[:2] for what in by_others | by_killed} == expected(alone)


def test_workers_and_one_that_is_killed_in_mid_generation(folder: Path, processes, storage) -> None:
    settings, opening = storage
    name = f"killed_{settings[0].partition('=')[2]}" if settings else "killed_journal"
    leader = processes(*SEARCH, *HELD, *settings, *SHARED, f"name={name}")
    run = str(begun(folder, name))
    opened = until(lambda: list(folder.glob("runs/*/*/run.json")) and opening(name))
    queue = until(lambda: queue_of(opened))
    victim = processes("worker", run, FOREVER, *settings)
    others = [processes("worker", run, *settings), processes("worker", f"name={name}", *settings)]
    assert until(lambda: held_by(queue, victim))
    victim.kill()
    assert until(lambda: all(held_by(queue, process) for process in others))
    open_gate()
    assert ended(leader, *others) == [0, 0, 0]
    same_as_alone(folder, name)
    assert victim.pid not in scorers(folder) and len(scorers(folder)) > 1
    assert optuna.get_all_study_names(opened) == [queue.name.removesuffix(SUFFIX)]


def test_a_search_that_is_killed_goes_on_with_its_workers_and_scores_nothing_twice(folder: Path, processes) -> None:
    name = "leader"
    leader = processes(*SEARCH, *SHARED, f"name={name}", f"+scorer.gate={GATE}", "+scorer.gate_from=2")
    run = begun(folder, name)
    workers = [processes("worker", str(run), "scorer.gate=null") for _ in range(2)]
    state = run / "search_state.jsonl"
    assert until(lambda: lines(state) > 2 and any(what[0] == "2" for what, _ in scored(folder)))
    leader.kill()
    open_gate()
    again = processes("resume", str(run))
    assert ended(again, *workers) == [0, 0, 0]
    same_as_alone(folder, name, killed=leader.pid)
    assert {process.pid for process in workers} & scorers(folder)


def test_a_worker_that_was_thought_dead_delivers_too_late(folder: Path, processes, capfd) -> None:
    name = "late"
    leader = processes(*SEARCH, *HELD, *SHARED, f"name={name}")
    run = str(begun(folder, name))
    queue = journal_queue(name)
    slow = processes("worker", run, "scorer.log=late.txt")
    assert until(lambda: held_by(queue, slow))
    os.kill(slow.pid, signal.SIGSTOP)
    open_gate()
    assert ended(leader) == [0]
    os.kill(slow.pid, signal.SIGCONT)
    assert ended(slow) == [0]
    same_as_alone(folder, name)
    said = capfd.readouterr().out
    assert "1 parts came too late and were dropped" in said and "no sign of life for 4 s" in said


def test_a_worker_that_is_stopped_gives_its_part_back_at_once(folder: Path, processes, capfd) -> None:
    name = "stopped"
    leader = processes(*SEARCH, *HELD, "workers.parts=4", "workers.lease=1000", f"name={name}")
    run = str(begun(folder, name))
    queue = journal_queue(name)
    worker = processes("worker", run, FOREVER)
    assert until(lambda: held_by(queue, worker))
    os.kill(worker.pid, signal.SIGTERM)
    open_gate()
    assert ended(leader, worker) == [0, 143]
    same_as_alone(folder, name)
    assert "it was stopped" in capfd.readouterr().out


def test_more_workers_than_candidates_is_said(folder: Path, processes, capfd) -> None:
    name = "many"
    leader = processes(*SEARCH, *HELD, "search.offspring=2", "workers.parts=8", f"name={name}")
    run = str(begun(folder, name))
    workers = [processes("worker", run) for _ in range(3)]
    queue = journal_queue(name)
    assert until(lambda: len(queue.workers()) == len(workers))
    open_gate()
    assert ended(leader, *workers) == [0] * 4
    said = " ".join(capfd.readouterr().out.split())
    assert "4 processes share the scoring, but a stage has 3 parts at most: the others wait; raise search.off" in said


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the line that a command ends with."""
    assert evosweep(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("error: ")


def test_what_a_worker_cannot_join_is_one_line(folder: Path, processes, capsys) -> None:
    alone = str(only_run(folder, "alone"))
    assert "is over" in refused(capsys, "worker", alone)
    assert "must be the folder of a run" in refused(capsys, "worker", "nowhere")
    assert "the journal of a search that has begun, got 'studies/none.journal'" in refused(
        capsys, "worker", "name=none"
    )
    assert "no search in this storage waits for workers" in refused(capsys, "worker", "name=alone")
    assert "helps one search" in refused(capsys, "worker", alone, alone)
    assert "not both" in refused(capsys, "worker", alone, "study=x")
    assert "--patience must be a number above 0, got -1" in refused(capsys, "worker", alone, "--patience=-1")
    assert "storage must be one that other processes reach" in refused(capsys, *TINY, *SHARED, "storage=memory")
    name = "asked"
    leader = processes(*SEARCH, *SHARED, f"name={name}", "++scorer.seconds=1000")
    run = str(begun(folder, name))
    queue = journal_queue(name)
    study = queue.name.removesuffix(SUFFIX)
    assert f"did you mean {study!r}" in refused(capsys, "worker", f"name={name}", f"study={study[:-1]}")
    assert "its seed is 0, here it is 3" in refused(capsys, "worker", run, "seed=3")
    assert "its problem is" in refused(capsys, "worker", f"name={name}", "budget.as_uniform=4")
    assert "there is no setting 'sed' (did you mean 'seed'?)" in refused(capsys, "worker", run, "sed=3")
    assert leader.is_alive()
    leader.kill()
    idle = " ".join(run_quietly(capsys, "worker", run, "--patience=1", "scorer.seconds=0").split())
    assert "there was no more work: 0 candidates" in idle or "candidates scored in" in idle


def run_quietly(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command says."""
    capsys.readouterr()
    assert evosweep(*arguments) == 0
    return capsys.readouterr().out


def test_a_run_that_shares_nothing_says_how(folder: Path, processes, capsys) -> None:
    leader = processes(*SEARCH, "name=unshared", "++scorer.seconds=1000")
    run = str(begun(folder, "unshared"))
    assert "start it with workers.parts=N" in refused(capsys, "worker", run)
    assert leader.is_alive()
