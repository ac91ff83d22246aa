"""Where else a run is recorded, and whether it is over: one that was killed goes on as the same run and study."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evosweep.core.files import write_json
from evosweep.core.results import RESULT

RUN_RECORD = "run.json"
SEVERAL = "budgets.json"  # of a run with a list of budgets: their folders, and the name that joins them


@dataclass(frozen=True)
class RunRecord:
    """Names of a run elsewhere, and whether it is over.

    Attributes:
        mlflow_run: Id of its MLflow run; None if it has none.
        study: Name of its Optuna study; None if it has none yet.
        finished: Whether nothing is left to do: its result is there before its export and its last figures are.
    """

    mlflow_run: str | None = None
    study: str | None = None
    finished: bool = False

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Return the record in a run's folder; an empty one if there is none."""
        try:
            found = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
            return cls(found.get("mlflow_run"), found.get("study"), bool(found.get("finished", True)))
        except (OSError, ValueError, AttributeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write the record into a run's folder."""
        write_json(folder / RUN_RECORD, asdict(self))


def is_finished(folder: Path) -> bool:
    """Return whether a run has its result, and nothing is left to do; runs of earlier versions have no record."""
    if not (folder / RESULT).is_file():
        return (folder / SEVERAL).is_file() and RunRecord.read(folder).finished
    return RunRecord.read(folder).finished or not (folder / RUN_RECORD).is_file()


def several_of(folder: Path) -> Mapping[str, Any]:
    """Return ``budgets`` (folders below it) and ``multirun`` of a run with a list of budgets; empty for any other."""
    try:
        value = json.loads((folder / SEVERAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def command_of(config: Path) -> str:
    """Return the command in the first line of a run's ``config.yaml``; empty where a run began from Python."""
    if not config.is_file():
        return ""
    first, *_ = config.read_text(encoding="utf-8").splitlines()
    return first.lstrip("# ")
