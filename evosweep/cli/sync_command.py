"""``evosweep sync``: delivers to MLflow what runs kept in their folders while its server was away."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evosweep.cli.compose import build
from evosweep.cli.find import CONFIG, find_run
from evosweep.cli.reopen import settings_of
from evosweep.cli.resume import hold
from evosweep.core.errors import EvosweepError
from evosweep.core.redact import redact
from evosweep.core.results import RESULT, read_result, write_result
from evosweep.core.run_record import RunRecord
from evosweep.tracking.console import terminal
from evosweep.tracking.mlflow_tracker import MlflowTracker
from evosweep.tracking.mlflow_tracker.spool import UNSENT
from evosweep.tracking.mlflow_tracker.store import resolved_uri
from evosweep.tracking.mlflow_tracker.sync import sync

MASKED = "***@"  # in an address whose password was left out of a file


def add_commands(commands: Any, *, overrides: str) -> None:
    """Add ``sync`` to the command line; ``overrides`` is the help of its settings."""
    added = commands.add_parser("sync", help="deliver to MLflow what a run kept while the server was away")
    added.add_argument("run", help="the folder of a run or of a multirun, or the id of an MLflow run")
    added.add_argument("overrides", nargs="*", help=f"{overrides}: tracking.uri=http://me:password@host")
    added.set_defaults(call=_sync)


def _sync(options: argparse.Namespace, conf: Path) -> None:
    top = Path(options.run) if Path(options.run).is_dir() else find_run(options.run)
    waiting = sorted((path.parent for path in top.rglob(UNSENT)), key=lambda path: (-len(path.parts), path))
    if not waiting:
        _say(f"nothing is left to deliver: there is no {UNSENT} in {top}")
    for folder in waiting:  # jobs before the summary of their multirun
        _deliver(folder, options.overrides, conf)


def _deliver(folder: Path, overrides: Sequence[str], conf: Path) -> None:
    if not hold(folder):
        raise EvosweepError(f"another process works on {folder}; it delivers by itself")
    tracker = _tracker(folder, overrides, conf)
    tracker.check()
    if tracker.away:
        raise EvosweepError(f"{tracker.away}; what is left to deliver stays in {folder / UNSENT}")
    found = sync(folder, tracker.client)
    if found.run is not None and (folder / CONFIG).is_file():
        _name_run(folder, found.run, tracker.link)
    if found.left:
        raise EvosweepError(
            f"MLflow took {found.sent} of {found.sent + found.left} writes, the others stay in {folder / UNSENT}: "
            f"{found.reason}"
        )
    _say(f"{found.sent} writes of {folder} delivered{f': run {found.run}' if found.run else ''}")


def _tracker(folder: Path, overrides: Sequence[str], conf: Path) -> MlflowTracker:
    """Return the tracker of a run, or of the first job of a multirun."""
    own = folder if (folder / CONFIG).is_file() else next((path.parent for path in folder.glob(f"*/{CONFIG}")), folder)
    if not (own / CONFIG).is_file():
        raise EvosweepError(f"{folder} holds no run (no {CONFIG})")
    tracker = build(settings_of(own, overrides, conf), "tracking")
    if not isinstance(tracker, MlflowTracker):
        raise EvosweepError(f"{folder} is not tracked by MLflow: tracking=mlflow delivers to it")
    if MASKED in resolved_uri(tracker.uri):
        raise EvosweepError(
            f"the password of {redact(resolved_uri(tracker.uri))} is kept nowhere: add tracking.uri=.. with it to the "
            "command"
        )
    return tracker


def _name_run(folder: Path, run: str, link: str | None) -> None:
    """Write down where a run is tracked, which was not known while it ran."""
    known = RunRecord.read(folder)
    if known.mlflow_run != run:
        replace(known, mlflow_run=run).write(folder)
    if (folder / RESULT).is_file():
        write_result(folder, {**read_result(folder / RESULT), "mlflow_run": run, "mlflow_link": link})


def _say(text: str) -> None:
    terminal().print(text, highlight=False, markup=False, soft_wrap=True)
