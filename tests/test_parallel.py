"""Processes that share calibration, scoring and measurements give what one process gives, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evosweep.cli.main import main
from evosweep.core.results import read_result
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.shared import Wanted, _assembled, _computed, shares
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from tests.cli import TINY, evosweep, workplace, write_corpus
from tests.faults.processes import lines, only_run, outcome

RUN = [*TINY, "tracking=none", "export=none", "report=none", "model.device=cpu", "search.generations=4"]
SEARCH = ["sampler=evopress_ilp_scaled", "search.racing=0.2", "search.final=true", "units=quantized"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENCE = 120.0
WARM = ["evosweep.cli.job", "evosweep.cli.follow", "tests.test_parallel"]


def command(folder: Path, name: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Run the command line in this process; what it writes goes to files named after it."""
    os.chdir(folder)
    os.environ.update(environment)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.argv = ["evosweep", *arguments]
    main()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Processes:
    """One command in several processes, as torchrun would start it, without torchrun.

    Python is started once for all of them, and forks.
    """

    def __init__(
        self, folder: Path, count: int, *arguments: str, last: dict[str, str] | None = None, **environment: str
    ) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(WARM)
        self.folder = folder
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        common = {**meeting, "OMP_NUM_THREADS": "1", "EVOSWEEP_CACHE": str(folder / "cache"), **environment}
        own = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        own[-1] |= last or {}
        self.all = [
            context.Process(target=command, args=(folder, f"rank{rank}", list(arguments), own[rank]))
            for rank in range(count)
        ]
        for process in self.all:
            process.start()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something is true while the first process runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.all[0].is_alive() and time.monotonic() < deadline, self.errors()
            time.sleep(0.01)

    def codes(self) -> list[int | None]:
        """Return the exit codes, once all have ended."""
        for process in self.all:
            process.join(PATIENCE)
        return [process.exitcode for process in self.all]

    def errors(self) -> str:
        """Return what all processes wrote to stderr."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank*.err")))

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.all:
            process.kill()


@pytest.fixture
def run() -> Iterator[Any]:
    """Return a function that starts a command in several processes; none of them outlives the test."""
    started: list[Processes] = []

    def start(*args: Any, **environment: Any) -> Processes:
        started.append(Processes(*args, **environment))
        return started[-1]

    yield start
    for processes in started:
        processes.end()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a search by one process, with its corpus and cache."""
    with workplace(tmp_path_factory.mktemp("alone")) as folder:
        assert evosweep(*RUN, *SEARCH, "name=one") == 0
    return folder


def measured(folder: Path) -> dict[str, str]:
    """Return the columns that were measured in a cache, by file; and forget them there."""
    found = {path.name: path.read_text() for path in (folder / "cache" / "columns").glob("*.json")}
    for name in found:
        (folder / "cache" / "columns" / name).unlink()
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_find_what_one_finds(alone: Path, run: Any, count: int) -> None:
    columns = measured(alone)
    processes = run(alone, count, *RUN, *SEARCH, f"name=of{count}")
    assert processes.codes() == [0] * count, processes.errors()
    assert measured(alone) == columns
    assert len(columns) == 1
    assert outcome(only_run(alone, f"of{count}")) == outcome(only_run(alone, "one"))
    for name, text in columns.items():
        (alone / "cache" / "columns" / name).write_text(text)


def test_curvature_and_finishing_are_shared(alone: Path, run: Any) -> None:
    arguments = [*RUN, "search.generations=0", "sampler=hawq_v2", "finish=bias_tuning", "finish.steps=2"]
    arguments += ["evaluate.activations=int8", "export=packed"]
    processes = run(alone, 2, *arguments, "name=finished2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        patch.setenv("EVOSWEEP_CACHE", str(alone / "cache-of-one"))
        (alone / "cache-of-one").mkdir(exist_ok=True)
        if not (alone / "cache-of-one" / "stores").exists():
            (alone / "cache-of-one" / "stores").symlink_to(alone / "cache" / "stores")
        assert processes.codes() == [0, 0], processes.errors()
        assert evosweep(*arguments, "name=finished1") == 0
    one, two = (read_result(only_run(alone, name) / "result.json") for name in ("finished1", "finished2"))
    for row in (one, two):
        del row["finish"]["seconds"]
    assert two["finish"] == one["finish"]
    assert two["finish"]["kl_after"] != two["finish"]["kl_before"]
    assert two["kl_by_window"] == one["kl_by_window"]
    allocations = [
        json.loads((only_run(alone, name) / "allocation.json").read_text()) for name in ("finished1", "finished2")
    ]
    assert allocations[0]["allocation"] == allocations[1]["allocation"]
    assert (only_run(alone, "finished2") / "model").is_dir()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("windows", [1, 2, 3, 4, 7])
def test_shares_cover_every_window_of_every_candidate_once(processes: int, windows: int) -> None:
    candidates = 7
    seen = np.zeros((candidates, windows), dtype=int)
    sizes = []
    for parts in shares(candidates, windows, processes):
        sizes.append(0)
        for rows, span in parts:
            seen[rows, span] += 1
            sizes[-1] += seen[rows, span].size
    assert (seen == 1).all()
    assert max(sizes) - min(sizes) <= windows % processes


def test_shares_put_together_are_the_whole(evaluator: Evaluator) -> None:
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, 3, (4, len(evaluator.store.units)))
    fitness = [KL(), Perplexity()]
    windows = [5, 0, 3, 2, 6]
    whole = evaluator.token_losses(genomes, split="search", windows=windows, fitness=fitness, length=24)
    wanted = Wanted("search", windows, fitness, 24)
    dealt = shares(len(genomes), len(windows), 3)
    found = [_computed(evaluator, genomes, parts, wanted) for parts in dealt]
    put_together = _assembled(found, dealt, (len(genomes), len(windows)), fitness)
    for one in fitness:
        assert np.array_equal(put_together[one.name], whole[one.name])


def manifest(folder: Path) -> dict:
    (path,) = (folder / "cache" / "stores").glob("*/manifest.json")
    return json.loads(path.read_text())


def test_torchrun_builds_what_one_process_builds(tmp_path: Path) -> None:
    arguments = [*RUN, "sampler=uniform", "drop=sublayers"]
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir()
    with workplace(folders["one"]):
        assert evosweep(*arguments) == 0
    write_corpus(folders["two"])
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "evosweep", *arguments],
        cwd=folders["two"],
        env={**os.environ, "EVOSWEEP_CACHE": str(folders["two"] / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (manifest(folder) for folder in folders.values())
    assert one["key"] == two["key"]
    for alone, shared in zip(one["units"], two["units"], strict=True):
        # A weight on the threshold of outliers counts or does not.
        assert shared["columns"] == pytest.approx(alone["columns"], rel=1e-2, abs=2e-3)
        for here, there in zip(alone["levels"], shared["levels"], strict=True):
            assert there["cost"] == here["cost"]
            if here.get("error") is not None:
                assert there["error"] == pytest.approx(here["error"], rel=0.05)
    kl = [read_result(only_run(folder, "evosweep") / "result.json")["kl"] for folder in folders.values()]
    assert kl[1] == pytest.approx(kl[0], rel=0.05)


def test_a_killed_process_ends_all_with_one_line_and_one_process_goes_on(alone: Path, run: Any) -> None:
    arguments = [*RUN, *SEARCH, "name=killed"]
    processes = run(alone, 2, *arguments)
    states = lambda: [*alone.glob("runs/killed/*/search_state.jsonl")]  # noqa: E731
    processes.wait_for(lambda: states() and lines(states()[0]) >= 3)
    processes.all[1].kill()
    assert processes.codes() == [2, -signal.SIGKILL], processes.errors()
    errors = processes.errors()
    assert errors.count("error: ") == 1
    assert "resume=auto" in errors
    assert "Traceback" not in errors
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        patch.setenv("EVOSWEEP_CACHE", str(alone / "cache"))
        assert evosweep(*arguments, "resume=auto") == 0
    assert outcome(only_run(alone, "killed")) == outcome(only_run(alone, "one"))


def test_a_leader_that_is_killed_or_a_process_that_hangs_ends_the_other(alone: Path, run: Any) -> None:
    arguments = [*RUN, *SEARCH, "search.generations=400"]
    first = run(alone, 2, *arguments, "name=headless")
    first.wait_for(lambda: [*alone.glob("runs/headless/*/search_state.jsonl")])
    first.all[0].kill()
    assert first.codes() == [-signal.SIGKILL, 2], first.errors()
    assert "another process of the 2 has ended" in first.errors()
    second = run(alone, 2, *arguments, "name=hung", EVOSWEEP_RANKS_TIMEOUT="12")
    second.wait_for(lambda: [*alone.glob("runs/hung/*/search_state.jsonl")])
    os.kill(second.all[1].pid, signal.SIGSTOP)
    second.all[0].join(PATIENCE)
    second.all[1].kill()  # as torchrun does
    assert second.codes() == [2, -signal.SIGKILL], second.errors()
    assert second.errors().count("error: ") == 1
    assert "another process did not answer within 12 s (EVOSWEEP_RANKS_TIMEOUT)" in second.errors()


def test_the_error_of_another_process_is_the_leaders(alone: Path, run: Any) -> None:
    elsewhere = {"EVOSWEEP_CACHE": str(alone / "no-store-here")}  # as on a second host without the first one's disk
    processes = run(alone, 2, *RUN, *SEARCH, "name=apart", last=elsewhere)
    assert processes.codes() == [2, 0], processes.errors()
    (error,) = [line for line in processes.errors().splitlines() if line.startswith("error: ")]
    assert error.startswith("error: process 1 of 2: ")
    assert "no-store-here" in error


def test_a_signal_ends_all_and_they_go_on_later(alone: Path, run: Any) -> None:
    arguments = [*RUN, *SEARCH, "name=stopped", "search.generations=40"]
    processes = run(alone, 2, *arguments)
    states = lambda: [*alone.glob("runs/stopped/*/search_state.jsonl")]  # noqa: E731
    processes.wait_for(lambda: states() and lines(states()[0]) >= 3)
    for process in processes.all:
        os.kill(process.pid, signal.SIGTERM)
    assert processes.codes() == [143, 143], processes.errors()
    assert "Traceback" not in processes.errors()
    again = run(alone, 2, *RUN, *SEARCH, "name=stopped", f"resume={only_run(alone, 'stopped')}")
    assert again.codes() == [0, 0], again.errors()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere.jsonl"], "data.path"),
        (["tokens.calibration=64"], "for 2 processes"),  # more processes than windows
        (["sampler=uniform", "fitness=nothing"], "nothing"),
    ],
)
def test_an_error_of_all_is_one_line(alone: Path, run: Any, arguments: list[str], message: str) -> None:
    processes = run(alone, 2, *RUN, *arguments, "name=broken")
    codes = processes.codes()
    assert codes[0] == 2, processes.errors()
    assert codes[1] == 0
    errors = [line for line in processes.errors().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in processes.errors()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number of processes, got 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT not: start with torchrun"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "EVOSWEEP_RANKS_TIMEOUT": "0.5"},
            "the 2 processes did not meet at 127.0.0.1",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "EVOSWEEP_RANKS_TIMEOUT": "0.5"},
            "within 0.5 s (EVOSWEEP_RANKS_TIMEOUT)",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "EVOSWEEP_RANKS_TIMEOUT": "soon"},
            "environment variable EVOSWEEP_RANKS_TIMEOUT must be a number of seconds above 0, got 'soon'",
        ),
    ],
)
def test_processes_that_cannot_meet_say_so(environment: dict[str, str], message: str, monkeypatch, capfd) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "MASTER_ADDR" in environment:
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert evosweep("model=tiny") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
