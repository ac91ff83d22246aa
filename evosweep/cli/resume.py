"""Finds the run or multirun that a command goes on with: ``resume=auto``, an MLflow run's id, or a folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from evosweep.cli.compose import imply_budget
from evosweep.cli.find import CONFIG, find_run
from evosweep.cli.folders import CLAIM
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.files import write_json
from evosweep.core.redact import redact
from evosweep.core.results import RESULT
from evosweep.core.run_record import is_finished

AUTO = "auto"
LAUNCH = "launch.json"  # of a multirun: what was typed, its name, and whether it is over
FREE = (
    "resume",
    "hydra",
    "export",
    "report",
    "tracking",
    "evaluate",
    "workers",
    *(f"search.{key}" for key in ("generations", "tokens", "patience", "final")),
)  # settings that may differ when a search goes on
_held: list[FileLock] = []  # locks of the folders that this process works in, until it ends


def hold(folder: Path) -> bool:
    """Return whether this process has a run's folder for itself; the system frees it when the process ends."""
    lock = FileLock(folder / f".{CLAIM}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return False
    _held.append(lock)
    return True


def let_go() -> None:
    """Free every folder that this process holds: its command is over."""
    while _held:
        _held.pop().release()


def earlier_folder(config: DictConfig, folder: Path, *, multirun: bool) -> Path | None:
    """Return the folder of the run or multirun that ``resume`` names; None to begin a new one.

    Args:
        config: Of the command.
        folder: That a new run would have; an earlier one of ``resume=auto`` is beside it.
        multirun: Whether the command is a multirun.

    Raises:
        EvosweepError: ``resume`` names no run, one that still runs, or one of other settings.
    """
    wanted = config.get("resume")
    if wanted is None:
        return None
    if not isinstance(wanted, str) or not wanted:
        raise SettingError("resume", allowed="null, auto, a run's folder or the id of its MLflow run", got=wanted)
    if wanted == AUTO:
        return next(_unfinished(config, folder.parent, multirun=multirun), None)
    found = _named(wanted, multirun=multirun)
    if not multirun:
        _check_same(config, found)
        check_unfinished(found, config)
    if not hold(found):
        raise EvosweepError(f"resume={wanted}: another process works on that run; end it first, or leave resume out")
    return found


def over(folder: Path, config: DictConfig) -> bool:
    """Return whether a run is finished, and the settings ask for no more generations than it had."""
    return is_finished(folder) and config.search.generations <= _generations(folder)


def check_unfinished(folder: Path, config: DictConfig) -> None:
    """Raise EvosweepError where a run is over and its settings ask for no further generation."""
    if over(folder, config):
        raise EvosweepError(
            f"the search of {folder} is over: its {RESULT} is there; nothing is left to resume, unless "
            f"search.generations is raised above {_generations(folder)}"
        )


def _generations(folder: Path) -> int:
    """Return how many generations a run was to have."""
    return int(OmegaConf.load(folder / CONFIG).search.generations)


def write_launch(folder: Path, *, overrides: list[str], multirun: str, finished: bool) -> None:
    """Write what a later command needs to go on with a multirun.

    Args:
        folder: Of the multirun.
        overrides: As typed.
        multirun: Its name.
        finished: Whether it is over.
    """
    write_json(folder / LAUNCH, {"overrides": redact(overrides), "multirun": multirun, "finished": finished})


def multirun_of(folder: Path) -> str | None:
    """Return the name of the multirun in a folder; None where there is none."""
    name = _launch(folder).get("multirun")
    return str(name) if name else None


def _launch(folder: Path) -> Mapping[str, Any]:
    try:
        value = json.loads((folder / LAUNCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _unfinished(config: DictConfig, runs: Path, *, multirun: bool) -> Iterator[Path]:
    """Yield the unfinished runs or multiruns of the same command, the newest first, that no process works on."""
    mark = LAUNCH if multirun else CONFIG
    found = sorted(runs.glob(f"*/{mark}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in found):
        if multirun:
            launch = _launch(folder)
            same = launch.get("overrides") == redact(typed(config)) and not launch.get("finished")
        else:
            same = not is_finished(folder) and not _differences(config, folder)
        if same and hold(folder):
            yield folder


def typed(config: DictConfig) -> list[str]:
    """Return the overrides of a command but for ``resume``."""
    return [text for text in config.hydra.overrides.task if not text.lstrip("+").startswith("resume=")]


def _named(wanted: str, *, multirun: bool) -> Path:
    """Return the folder of a run or multirun that was named."""
    if multirun:
        folder = Path(wanted)
        if not (folder / LAUNCH).is_file():
            raise SettingError("resume", allowed="auto, or the folder of a multirun", got=wanted)
        return folder
    return find_run(wanted, setting="resume")


def _check_same(config: DictConfig, folder: Path) -> None:
    differing = _differences(config, folder)
    if differing:
        key, then, now = differing[0]
        more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise EvosweepError(
            f"resume={folder}: that run is of another problem: {key} is {then!r} there and {now!r} now{more}; "
            "set it as it was, or leave resume out"
        )


def _differences(config: DictConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """Return setting, earlier value and value now of every setting that must be the same and is not."""
    mine = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    imply_budget(mine, list(config.hydra.overrides.task))
    then = _flat(OmegaConf.load(folder / CONFIG))
    now = _flat(OmegaConf.create(redact(OmegaConf.to_yaml(mine, resolve=True))))
    keys = dict.fromkeys([*then, *now])
    return [(key, then.get(key), now.get(key)) for key in keys if not _free(key) and then.get(key) != now.get(key)]


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    """Return every value of a configuration by its full name; lists are values."""
    value = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{path}.{key!s}" if path else str(key))
    return flat
