"""Finds the folder of a run by its path or the id of its MLflow run."""

import re
from pathlib import Path

from evosweep.core.errors import EvosweepError, did_you_mean

RUN_ID = re.compile(r"[0-9a-f]{32}")
ALLOCATION = "allocation.json"
CONFIG = "config.yaml"


def find_run(run: str, *, setting: str = "a run") -> Path:
    """Return the folder of a run.

    Args:
        run: A folder, or the id of an MLflow run that was made from this machine.
        setting: What the user named it by, for the error message.

    Raises:
        EvosweepError: There is no such folder or run, or it holds no run.
    """
    folder = Path(run)
    if not folder.exists() and RUN_ID.fullmatch(run):
        folder = _folder_of(run)
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, siblings)
        raise EvosweepError(f"{setting} must be the folder of a run or the id of its MLflow run, got {run!r}{hint}")
    if not (folder / CONFIG).is_file():
        below = sorted(path.parent for path in folder.rglob(ALLOCATION) if (path.parent / CONFIG).is_file())
        hint = f"; runs below it: {', '.join(map(str, below[:5]))}" if below else ""
        raise EvosweepError(f"{folder} holds no run (no {CONFIG}){hint}")
    return folder


def _folder_of(run_id: str) -> Path:
    from mlflow import MlflowClient  # noqa: PLC0415 - heavy
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        tags = MlflowClient().get_run(run_id).data.tags
    except MlflowException as error:
        raise EvosweepError(f"MLflow has no run {run_id} here: {str(error).splitlines()[0]}") from error
    folder = Path(tags.get("folder", ""))
    if not tags.get("folder") or not folder.is_dir():
        raise EvosweepError(f"the folder of MLflow run {run_id} is not on this machine: {folder}")
    return folder
