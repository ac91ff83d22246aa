"""A run that is killed in any of its phases goes on, by ``resume=auto``, to what it would have found undisturbed."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli import TINY, evosweep, workplace
from tests.faults.forked import fork, killed_when
from tests.faults.processes import PATIENCE, lines, logged, only_run, outcome, trials

RUN = [
    *TINY,
    "model.config.num_hidden_layers=6",
    "search.generations=10",
    "sampler=evopress_ilp_scaled",
    "search.final=true",
    "evaluate.sensitivity_tokens=512",
    "report=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("kill")) as folder:
        assert evosweep(*RUN, "name=whole") == 0
        yield folder


def store_has_begun(folder: Path, cache: Path, name: str) -> object:
    return any(cache.glob("stores/*.partial/[1-5].json"))


def some_windows_are_measured(folder: Path, cache: Path, name: str) -> object:
    return any(lines(path) >= 3 for path in cache.glob("columns/*.steps"))


def generations_are_done(folder: Path, cache: Path, name: str) -> object:
    return any(lines(path) >= 5 for path in folder.glob(f"runs/{name}/*/search_state.jsonl"))


def export_has_begun(folder: Path, cache: Path, name: str) -> object:
    return any(folder.glob(f"runs/{name}/*/.model.partial/packed.safetensors"))


PHASES: dict[str, tuple[Callable[[Path, Path, str], object], str]] = {
    "store": (store_has_begun, "blocks are there already"),
    "measurement": (some_windows_are_measured, "8 steps were done before"),
    "search": (generations_are_done, "going on after generation"),
    "export": (export_has_begun, "going on after generation 10"),
}


def generations(state: Path) -> list[dict]:
    """Return the generations that are whole in a search state, with the seconds that they took."""
    text = state.read_text().splitlines(keepends=True)[1:] if state.is_file() else []
    found = [json.loads(line) for line in text if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key != "sampler"} for line in found]


def exported(run: Path) -> dict:
    return {name: tensor.tolist() for name, tensor in load_file(run / "model" / "packed.safetensors").items()}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_killed_goes_on_to_what_it_would_have_found(folder: Path, phase: str) -> None:
    reached, said = PHASES[phase]
    cache = folder / f"cache_{phase}"
    process = fork(folder, *RUN, f"name={phase}", cache=cache)
    assert killed_when(lambda: reached(folder, cache, phase), process), cache.with_suffix(".err").read_text()
    run = only_run(folder, phase)
    state = run / "search_state.jsonl"
    before = generations(state)
    again = fork(folder, *RUN, f"name={phase}", "resume=auto", cache=cache)
    again.join(PATIENCE)
    assert again.exitcode == 0, cache.with_suffix(".err").read_text()
    whole = only_run(folder, "whole")
    assert only_run(folder, phase) == run and outcome(run) == outcome(whole)
    assert said in (run / "run.log").read_text()
    after = generations(state)
    assert len(after) == len(generations(whole / state.name))
    assert after[: len(before)] == before  # with their seconds: what was done is not scored again
    (status,), steps = logged(folder, phase)
    assert status == "FINISHED" and steps == logged(folder, "whole")[1]
    assert trials(folder, phase) == trials(folder, "whole")
    assert exported(run) == exported(whole)
    assert json.loads((run / "run.json").read_text())["finished"]
    assert not [*cache.glob("stores/*.partial"), *cache.glob("columns/*.steps"), *run.glob(".model.partial")]


def test_a_run_that_was_killed_before_its_last_word_says_everything_once(folder: Path) -> None:
    cache = folder / "cache_last"
    process = fork(folder, *RUN, "name=last", cache=cache)
    process.join(PATIENCE)
    assert process.exitcode == 0
    run = only_run(folder, "last")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": False}))  # all that was not written yet
    again = fork(folder, *RUN, "name=last", "resume=auto", cache=cache)
    again.join(PATIENCE)
    assert again.exitcode == 0 and outcome(only_run(folder, "last")) == outcome(only_run(folder, "whole"))
    assert logged(folder, "last") == logged(folder, "whole") and trials(folder, "last") == trials(folder, "whole")


@pytest.mark.parametrize("phase", ["store", "measurement"])
def test_a_scheduler_s_signal_keeps_what_is_done(folder: Path, phase: str) -> None:
    reached, said = PHASES[phase]
    name = f"stopped_{phase}"
    cache = folder / f"cache_{name}"
    process = fork(folder, *RUN, f"name={name}", cache=cache)
    while process.is_alive() and not reached(folder, cache, name):
        time.sleep(0.001)
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 143
    again = fork(folder, *RUN, f"name={name}", "resume=auto", cache=cache)
    again.join(PATIENCE)
    run = only_run(folder, name)
    assert again.exitcode == 0 and outcome(run) == outcome(only_run(folder, "whole"))
    assert said in (run / "run.log").read_text()


def test_a_finished_run_is_not_taken_up_again(folder: Path) -> None:
    before = only_run(folder, "whole").joinpath("result.json").stat().st_mtime_ns
    assert evosweep(*RUN, "name=whole", "resume=auto", "search.generations=0", "sampler=uniform") == 0
    (first, second) = sorted(folder.glob("runs/whole/*/result.json"))
    assert first.stat().st_mtime_ns == before and second != first
    for path in sorted(second.parent.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    second.parent.rmdir()
