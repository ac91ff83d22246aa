"""Finds the folder of a run by its path or the id of its MLflow run."""

import json
import os
import re
from pathlib import Path

from evosweep.core.errors import EvosweepError, did_you_mean
from evosweep.core.results import RESULT, write_result
from evosweep.core.run_record import several_of

RUN_ID = re.compile(r"[0-9a-f]{32}")
ALLOCATION = "allocation.json"
CONFIG = "config.yaml"
PROGRESS_BAR = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
RESTORED = Path("runs") / "from_mlflow"


def find_winner(run: str) -> Path:
    """Return the folder of a run that found an allocation.

    Args:
        run: A folder, or the id of an MLflow run.

    Raises:
        EvosweepError: There is no such run, or it ended before its first generation.
    """
    folder = find_run(run)
    several = several_of(folder).get("budgets")
    winner = several_of(folder).get("winner")
    if winner:
        return folder / winner
    if several:
        there = next((name for name in several if (folder / name / ALLOCATION).is_file()), several[0])
        raise EvosweepError(f"{folder} holds a run for each of its budgets: name one, as {folder / there}")
    if not (folder / ALLOCATION).is_file():
        raise EvosweepError(
            f"the run in {folder} has no winner: it ended before its first generation was over; python -m evosweep "
            f"resume {folder} goes on with it"
        )
    return folder


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
    return folder if tags.get("folder") and folder.is_dir() else _restored(run_id, folder)


def _restored(run_id: str, folder: Path) -> Path:
    """Return a folder with what MLflow keeps of a run whose own folder is elsewhere or gone.

    Raises:
        EvosweepError: MLflow has no settings or no winner of it.
    """
    from mlflow import MlflowClient  # noqa: PLC0415 - heavy

    client = MlflowClient()
    kept = {artifact.path for artifact in client.list_artifacts(run_id)}
    missing = [name for name in (CONFIG, ALLOCATION) if name not in kept]
    if missing:
        raise EvosweepError(
            f"the folder of MLflow run {run_id} is not on this machine ({folder}), and MLflow has no "
            f"{' and no '.join(missing)} of it: it ended before it had a winner, or it is the parent of others"
        )
    target = RESTORED / run_id
    target.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(PROGRESS_BAR, "false")
    for name in (CONFIG, ALLOCATION):
        client.download_artifacts(run_id, name, str(target))
    if RESULT in kept:  # MLflow has it as a flat row
        row = json.loads(Path(client.download_artifacts(run_id, RESULT)).read_text(encoding="utf-8"))
        write_result(target, {**row, "mlflow_run": run_id})
    return target
