"""Subcommands for runs that exist: export, score, compare, resume, resolve, sync, worker; and for the cache."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from evosweep.cli import cache_command, export_command, resolve_command, score_command, sync_command, worker_command
from evosweep.cli.find import find_run
from evosweep.cli.finish import SELECTION, export_lines, standings
from evosweep.cli.folders import CLAIM
from evosweep.cli.job import bench_of, notes_of, quiet_libraries, shared_progress, task_of
from evosweep.cli.reopen import settings_of
from evosweep.cli.resume import check_unfinished, hold
from evosweep.core.errors import EvosweepError
from evosweep.core.metrics import KL
from evosweep.core.results import RESULT, read_result
from evosweep.pipeline import CONFIG, check, run
from evosweep.tracking.console import summary, terminal


def run_command(arguments: Sequence[str], conf: Path) -> None:
    """Run a subcommand.

    Args:
        arguments: Its name, then what was typed behind it.
        conf: Folder of the configuration's files.

    Raises:
        EvosweepError: A run, a setting or a file that cannot be used.
    """
    quiet_libraries()
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    unknown = [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized: {' '.join(unknown)}")
    if rest:  # overrides behind an option
        options.overrides = [*options.overrides, *rest]
    options.call(options, conf)


class _Parser(argparse.ArgumentParser):
    """Argument parser that raises EvosweepError, which is printed as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise EvosweepError."""
        raise EvosweepError(f"{self.prog}: {message}; {self.prog} --help shows what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="evosweep", description="What follows a run.")
    commands = parser.add_subparsers(required=True)
    run = "the run's folder, or the id of its MLflow run"
    overrides = "settings to change, as export=dense; all others are the run's own"

    export_command.add_commands(commands, run=run)
    score_command.add_commands(commands)

    compare = commands.add_parser("compare", help="show several runs in one table")
    compare.add_argument("runs", nargs="+", help=f"each {run}; a folder above runs counts for all of them")
    compare.set_defaults(call=_compare)

    resume = commands.add_parser(
        "resume", help="go on with a run that was interrupted, or with search.generations=N make one longer"
    )
    resume.add_argument("run", help=run)
    resume.add_argument("overrides", nargs="*", help=overrides)
    resume.set_defaults(call=_resume)
    resolve_command.add_commands(commands, run=run)
    sync_command.add_commands(commands, overrides=overrides)
    worker_command.add_commands(commands, overrides=overrides)
    cache_command.add_commands(commands)
    return parser


def _row(path: Path) -> dict[str, Any]:
    """Return the row of a result; raise EvosweepError where it lacks what a table shows."""
    row = read_result(path)
    lacking = [key for key in ("run", "budget", "dense_ppl", KL) if key not in row]
    if lacking:
        raise EvosweepError(f"{path} is of no run that is over: it lacks {', '.join(lacking)}")
    return row


def _compare(options: argparse.Namespace, conf: Path) -> None:
    del conf
    paths: list[Path] = []
    for given in options.runs:
        folder = Path(given) if Path(given).is_dir() else find_run(given)
        found = [folder / RESULT] if (folder / RESULT).is_file() else _below(folder)
        if not found:
            raise EvosweepError(f"there is no {RESULT} in {folder} or below it")
        paths += found
    rows = [_row(path) for path in dict.fromkeys(paths)]
    console = terminal()
    console.print(summary(rows, title="runs"))
    for line in standings(rows):
        _say(line, console)
    _say(SELECTION, console)


def _below(folder: Path) -> list[Path]:
    """Return the results of all runs below a folder; MLflow's copies of them are left out."""
    found = sorted(folder.rglob(RESULT))
    return [path for path in found if (path.parent / "config.yaml").is_file() and "mlruns" not in path.parts]


def _resume(options: argparse.Namespace, conf: Path) -> None:
    folder = find_run(options.run)
    config = settings_of(folder, options.overrides, conf)
    check_unfinished(folder, config)
    if not hold(folder):
        raise EvosweepError(f"another process works on {folder}; end it first")
    task = task_of(config, folder=folder, resume=True)
    shared_progress().begin(prefix="", log=folder / CLAIM, first="resumed")
    bench = bench_of(config)
    first, *_ = (folder / CONFIG).read_text(encoding="utf-8").splitlines()
    typed = [*shlex.split(first.lstrip("# "))[3:], *options.overrides]
    choices = {"sampler": next((text.partition("=")[2] for text in typed if text.startswith("sampler=")), None)}
    notes = notes_of(config, task, model=bench.loaded.name, overrides=typed, choices=choices)
    row = run(task, bench, check(task, bench), notes)
    terminal().print(summary([row], title=str(config.name)))
    for line in [SELECTION, *export_lines([folder], [row])]:
        _say(line)


def _say(text: Any, console: Console | None = None) -> None:
    (console or terminal()).print(text, highlight=False, markup=False, soft_wrap=True)
