"""``evosweep worker``: scores parts of a search that another process runs."""

import argparse
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from evosweep.cli.compose import build
from evosweep.cli.find import find_run
from evosweep.cli.job import bench_of, shared_progress
from evosweep.cli.reopen import changed, settings_of
from evosweep.cli.sync_command import MASKED
from evosweep.core.checks import check_number
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.run_record import RunRecord, is_finished
from evosweep.search.shared_scorer import Served, serve
from evosweep.shared_search import check_same, shared_identity
from evosweep.tracking.console import terminal
from evosweep.tracking.study.work import SUFFIX, StudyQueue

STUDY = "study="
OF_STORAGE = ("storage", "name")  # settings by which a study is found
LOOK = 0.5  # seconds between two looks at whether a search has begun
PATIENCE = 600.0


@dataclass(frozen=True)
class Joined:
    """Study, settings and storage of the search that a worker joins."""

    study: str
    config: DictConfig
    storage: Any


def add_commands(commands: Any, *, overrides: str) -> None:
    """Add ``worker`` to the command line; ``overrides`` is the help of its settings."""
    added = commands.add_parser(
        "worker", help="help a search that was started with workers.parts=N: score parts of its generations"
    )
    added.add_argument(
        "overrides",
        nargs="*",
        metavar="run | setting=value",
        help="the run's folder; or the storage, as storage=database storage.url=.., with study=NAME where it holds "
        f"several searches. {overrides}",
    )
    added.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds without any work after which the worker ends"
    )
    added.set_defaults(call=_work)


def _work(options: argparse.Namespace, conf: Path) -> None:
    patience = check_number("--patience", options.patience, low=0, exclusive=True)
    runs = [text for text in options.overrides if "=" not in text]
    settings = [text for text in options.overrides if "=" in text]
    if len(runs) > 1:
        raise EvosweepError(f"a worker helps one search, got {' and '.join(runs)}; start one worker for each")
    folder = find_run(runs[0]) if runs else None
    joined = _of_folder(folder, settings, conf, patience=patience) if folder else _of_storage(settings, conf)
    terminal().print(_ended(_join(joined, patience)), highlight=False, markup=False, soft_wrap=True)


def _of_folder(folder: Path, settings: Sequence[str], conf: Path, *, patience: float) -> Joined:
    """Wait until the run of a folder searches; return its study, settings and storage.

    Args:
        folder: Of the run.
        settings: As typed.
        conf: Folder of the configuration's files.
        patience: Seconds to wait for it.

    Raises:
        EvosweepError: The run is over, shares nothing, or does not begin to search.
    """
    if any(text.startswith(STUDY) for text in settings):
        raise EvosweepError("give a worker either a run's folder or study=.., not both")
    config = settings_of(folder, settings, conf)
    if is_finished(folder):
        raise EvosweepError(f"the search of {folder} is over; there is nothing left to score")
    if OmegaConf.select(config, "workers.parts") is None:
        raise EvosweepError(f"the search of {folder} shares nothing: start it with workers.parts=N, as workers.parts=4")
    _check_password(config)
    bench_of(config)  # what takes long, while the search may still be measuring
    deadline = time.monotonic() + patience
    storage = build(config, "storage")
    opened = None
    while time.monotonic() < deadline:
        study = RunRecord.read(folder).study
        if study is not None:
            opened = opened or _existing(storage).open()
            if study + SUFFIX in optuna.get_all_study_names(opened):
                return Joined(study, config, opened)
        if is_finished(folder):
            raise EvosweepError(f"the search of {folder} is over; there is nothing left to score")
        time.sleep(LOOK)
    raise EvosweepError(
        f"the search of {folder} has not begun for {patience:g} s; start it, or give a longer --patience"
    )


def _of_storage(settings: Sequence[str], conf: Path) -> Joined:
    """Return study, settings and storage of the search that a storage holds.

    Raises:
        EvosweepError: It holds none that is shared, or several and none of them is named.
    """
    named = next((text.partition("=")[2] for text in settings if text.startswith(STUDY)), None)
    others = [text for text in settings if not text.startswith(STUDY)]
    where = [text for text in others if text.partition("=")[0].split(".")[0] in OF_STORAGE]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        composed = compose("config", overrides=where)
    storage = _existing(build(composed, "storage")).open()
    study = _study(named, optuna.get_all_study_names(storage))
    search = StudyQueue(storage=storage, study=study).search
    if search is None:
        raise EvosweepError(f"the search of study {study!r} is only beginning; try again in a moment")
    config = OmegaConf.create(search["config"])
    assert isinstance(config, DictConfig)
    return Joined(study, changed(config, [text for text in others if text not in where], conf), storage)


def _existing(storage: Any) -> Any:
    """Return a storage; raise SettingError where it is a file that is not there."""
    path = getattr(storage, "path", None)
    if path is not None and not path.is_file():
        raise SettingError(
            "storage.path",
            allowed="the journal of a search that has begun",
            got=str(path),
            hint="it is not there; start the worker where the search was started",
        )
    return storage


def _study(named: str | None, names: Sequence[str]) -> str:
    """Return the name of the study to join: the one that was typed, or the only one that waits for workers."""
    shared = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
    if named in shared:
        return str(named)
    if named in names:
        raise EvosweepError(f"the search of study {named!r} is over, or was started without workers.parts=N")
    if not shared:
        raise EvosweepError(
            "no search in this storage waits for workers: they are over, or were started without workers.parts=N"
        )
    if named is not None or len(shared) > 1:
        raise SettingError("study", allowed=shared, got=named)
    return shared[0]


def _check_password(config: DictConfig) -> None:
    url = OmegaConf.select(config, "storage.url")
    if url and MASKED in url:
        raise EvosweepError(f"the password of {url} is kept nowhere: add storage.url=.. with it to the command")


def _join(joined: Joined, patience: float) -> Served:
    """Score parts of a search until it is over.

    Raises:
        EvosweepError: This process would score another problem.
    """
    progress = shared_progress()
    config = joined.config
    bench = bench_of(config)
    problem = bench.problem(build(config, "budget"))
    fitness = build(config, "fitness")
    mine = shared_identity(bench, fitness, problem=problem, seed=config.seed)
    try:
        queue = StudyQueue(storage=joined.storage, study=joined.study)
    except KeyError as error:
        raise _over(joined.study) from error
    search = queue.search
    if search is None:
        raise _over(joined.study)
    check_same(mine, search["identity"], whose=f"study {joined.study!r}")
    scorer = build(config, "scorer")(evaluator=bench.evaluator, fitness=fitness, seed=config.seed)
    worker = f"{socket.gethostname()}-{os.getpid()}"
    others = len(queue.workers())
    queue.join(worker)
    progress.say(f"{worker} helps with {joined.study}")
    if others + 2 > search["parts"]:
        progress.say(
            f"{others + 2} processes share the scoring, but a stage has {search['parts']} parts at most: some will wait"
        )
    try:
        return serve(queue, scorer, problem=problem, worker=worker, lease=search["lease"], patience=patience)
    finally:
        queue.leave(worker)


def _over(study: str) -> EvosweepError:
    return EvosweepError(f"the search of study {study!r} is over; there is nothing left to score")


def _ended(served: Served) -> str:
    why = "the search is over" if served.ended == "finished" else "there was no more work"
    late = f"; {served.late} parts came too late and were dropped" if served.late else ""
    return f"{why}: {served.candidates} candidates scored in {served.parts} parts{late}"
