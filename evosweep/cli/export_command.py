"""The subcommand export: writes the allocation of a run that is over, in one format or several."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evosweep.cli.find import find_winner
from evosweep.cli.finish import export_lines
from evosweep.cli.reopen import export_earlier, exporter_of, reopen, settings_of
from evosweep.core.allocation import Allocation
from evosweep.core.errors import EvosweepError
from evosweep.core.results import RESULT, read_result, write_result
from evosweep.pipeline import CONFIG, MODEL
from evosweep.tracking.allocation_file import ALLOCATION
from evosweep.tracking.console import terminal

WINNERS = ("front", "uniform", "tails", "tasks", "controls", "history", "export", "exports", "finish", "continuations")
SEVERAL = "models"  # folder of a run's exports, where there are several


def add_commands(commands: Any, *, run: str) -> None:
    """Add ``evosweep export`` to the command line's subcommands.

    Args:
        commands: Subparsers.
        run: How a run is named, for the help.
    """
    export = commands.add_parser("export", help="write the allocation of a run as a model, without a search")
    export.add_argument("run", help=run)
    export.add_argument(
        "overrides", nargs="*", help="settings to change, as export=dense or export=packed,dense; others are the run's"
    )
    export.add_argument(
        "--to", type=Path, help="empty folder to write; by default model/ in the run's, for several models/<format>/"
    )
    export.set_defaults(call=_export)


def _export(options: argparse.Namespace, conf: Path) -> None:
    folder = find_winner(options.run)
    typed, point = _point(folder, options.overrides)
    names, overrides = _formats(typed)
    several = len(names) > 1
    settings = _settings(folder, names, overrides, conf)
    if options.to is not None:
        _check_empty(options.to)
    first = reopen(folder, next(iter(settings.values())), allocation=None if point is None else point / ALLOCATION)
    if point is not None:
        first = replace(first, folder=point, problem=first.problem.within(first.problem.cost(first.genome)), tuned={})
        folder = point
    runs = {name: replace(first, config=config) for name, config in settings.items()}
    for run in runs.values():
        exporter_of(run)  # all are checked before the first is written
    for name, run in runs.items():
        target = options.to or folder / (SEVERAL if several else MODEL)
        facts = export_earlier(run, target=target / name if several else target, name=name if several else "")
        row = read_result(folder / RESULT) if (folder / RESULT).is_file() else {"kl": float("nan")}
        for line in export_lines([folder], [{"run": str(folder), **row, "export": facts}]):
            terminal().print(line, highlight=False, markup=False, soft_wrap=True)


def _point(folder: Path, overrides: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the overrides without ``point=``, and the folder of that point of the run's front; None for the winner.

    Raises:
        EvosweepError: The run has no front, or no such point.
    """
    texts = [text for text in overrides if text.startswith("point=")]
    others = [text for text in overrides if text not in texts]
    if not texts:
        return others, None
    points = read_result(folder / RESULT).get("front") if (folder / RESULT).is_file() else None
    if not points:
        raise EvosweepError(f"{folder} has no front to take {texts[-1]} of: it is of sampler=nsga2_evopress alone")
    wanted = texts[-1].partition("=")[2]
    found = next((point for point in points if str(point["point"]) == wanted), None)
    if found is None:
        sizes = ", ".join(f"{point['point']} ({point['size_mb']:.1f} MB)" for point in points)
        raise EvosweepError(f"point must be one of {sizes}, got {wanted!r}")
    target = folder / f"point_{wanted}"
    target.mkdir(exist_ok=True)
    figures = {key: value for key, value in found.items() if key != "allocation"}
    Allocation(found["allocation"]).save(target / ALLOCATION, **figures)
    row = {key: value for key, value in read_result(folder / RESULT).items() if key not in WINNERS}
    write_result(target, {**row, **figures, "mlflow_run": None})
    (target / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    return others, target


def _settings(folder: Path, names: Sequence[str], overrides: Sequence[str], conf: Path) -> dict[str, DictConfig]:
    """Return the settings of every format; of several, an ``export.<setting>`` counts for those that have it.

    Args:
        folder: Of the run.
        names: Of the formats; an empty one is the run's own.
        overrides: What else was typed.
        conf: Folder of the configuration's files.

    Raises:
        EvosweepError: There is no such format or setting.
    """
    if len(names) == 1:
        return {name: settings_of(folder, [*_choice(name), *overrides], conf) for name in names}
    own = {text: text.partition("=")[0].removeprefix("export.") for text in overrides if text.startswith("export.")}
    others = [text for text in overrides if text not in own]
    plain = {name: settings_of(folder, [*_choice(name), *others], conf) for name in names}
    for text, key in own.items():
        if not any(key in config.export for config in plain.values()):
            raise EvosweepError(f"there is no setting export.{key} of {', '.join(names)} ({text})")
    taken = {name: [text for text, key in own.items() if key in config.export] for name, config in plain.items()}
    return {name: settings_of(folder, [*_choice(name), *others, *taken[name]], conf) for name in names}


def _choice(name: str) -> list[str]:
    return [f"export={name}"] if name else []


def _formats(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into the formats of ``export=a,b`` (none typed: ``[""]``) and the rest."""
    key = "export="
    names = [name.strip() for text in overrides if text.startswith(key) for name in text[len(key) :].split(",")]
    if len(set(names)) < len(names):
        raise EvosweepError(f"export must name each format once, got {', '.join(names)}")
    return names or [""], [text for text in overrides if not text.startswith(key)]


def _check_empty(target: Path) -> None:
    """Raise EvosweepError unless a folder is empty, or is not there yet."""
    if target.exists() and not target.is_dir():
        raise EvosweepError(f"--to must be a folder, got the file {target}")
    if target.is_dir() and any(target.iterdir()):
        raise EvosweepError(f"--to must be an empty folder or a new one, and {target} is not empty; remove it first")
