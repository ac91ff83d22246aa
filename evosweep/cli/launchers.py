"""Runs multiruns whose launcher starts jobs in other processes, so that one that fails does not stop the others.

A job's failure is kept in its folder, where the command that started it reads it, whichever launcher was between.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus

from evosweep.cli.launch import JOBS, MULTIRUN
from evosweep.core.files import write_json
from evosweep.core.redact import redact
from evosweep.core.results import RESULT

FAILED = "failed.json"  # why a job failed, in its folder
MAIN = "EVOSWEEP_MAIN"  # environment: process of the command; a launcher's workers have another
ONLY = "EVOSWEEP_ONLY"  # environment: JSON list of the numbers of the jobs that are run; the others are passed over
BROKEN = ("TerminatedWorkerError", "BrokenProcessPool")  # errors of a launcher whose worker was killed
KILLED = "its process was killed, perhaps out of memory; what it had done is kept, to be gone on with by resume="
ATTEMPTS = 3  # to run the jobs that are left side by side
Failure = tuple[str, int | None]


def number_of_job() -> int | None:
    """Return the number of the job in its multirun, from 0; None for a single run."""
    return int(HydraConfig.get().job.num) if MULTIRUN in os.environ else None


def passed_over() -> bool:
    """Return whether this job is left out of this attempt."""
    only = json.loads(os.environ.get(ONLY, "null"))
    return only is not None and number_of_job() not in only


def is_worker() -> bool:
    """Return whether this process is one that a launcher started for its jobs."""
    return os.environ.get(MAIN) != str(os.getpid())


def keep_failure(error: BaseException | str) -> None:
    """Write why this job failed into its folder; nothing for a single run, where nobody would read it."""
    if number_of_job() is None:
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"job": number_of_job(), "error": redact(" ".join(text.split()))})


def forget_failure() -> None:
    """Remove the error that an earlier attempt at this job left in its folder."""
    if number_of_job() is not None:
        (Path(HydraConfig.get().runtime.output_dir) / FAILED).unlink(missing_ok=True)


def failures(folder: Path) -> list[Failure]:
    """Return why jobs of a multirun failed, and their numbers: as they wrote, or since their process is no more."""
    found: list[Failure] = []
    for begun in sorted(_begun(folder), key=lambda path: (len(path.name), path.name)):
        if (begun / FAILED).is_file():
            kept = json.loads((begun / FAILED).read_text(encoding="utf-8"))
            found.append((str(kept["error"]), int(kept["job"])))
        elif begun.name.isdecimal() and not (begun / RESULT).is_file():
            found.append((KILLED, int(begun.name)))
    return found


def run_jobs(job: Callable[[], Any], *, folder: Callable[[], Path | None], again: Callable[[Path], None]) -> None:
    """Run a command's jobs to their end, also where a launcher gives up since one of its workers was killed.

    The jobs that were under way then are tried each for itself, so that the one which is killed again is known, and
    left out when the others go on.

    Args:
        job: Runs the jobs that are left.
        folder: Returns the folder of the multirun, None for a single run.
        again: Prepares another run of ``job`` that goes on in a folder.

    Raises:
        Exception: Whatever ``job`` raises, but for a worker's end in a multirun.
    """
    if _ends_well(job):
        return
    where = folder()
    count = int(os.environ.get(JOBS, "0"))
    if where is None or not count:
        return
    culprits: set[int] = set()
    for _ in range(ATTEMPTS):
        for number in sorted(_killed(where) - culprits):
            again(where)
            with _only([number]):
                if not _ends_well(job):
                    culprits.add(number)
        left = _left(where, range(count)) - culprits
        if not left:
            return
        again(where)
        with _only(sorted(left)):
            if _ends_well(job):
                return


def _killed(folder: Path) -> set[int]:
    return {number for text, number in failures(folder) if text == KILLED and number is not None}


def _left(folder: Path, numbers: Iterable[int]) -> set[int]:
    """Return the jobs that neither have a result nor failed."""
    ended = {int(path.parent.name) for name in (RESULT, FAILED) for path in folder.glob(f"[0-9]*/{name}")}
    return set(numbers) - ended


def _begun(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _ends_well(job: Callable[[], Any]) -> bool:
    """Run jobs; return False where a worker of the launcher was killed."""
    try:
        with waited_for():
            job()
    except Exception as error:
        if type(error).__name__ not in BROKEN:
            raise
        return False
    return True


@contextmanager
def _only(numbers: Sequence[int]) -> Iterator[None]:
    with patch.dict(os.environ, {ONLY: json.dumps(list(numbers))}):
        yield


class _Waited:
    """A job of submitit that has, where its process was killed, a failed result instead of an error."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def results(self) -> list[Any]:
        """Wait for the job; return its results."""
        from submitit.core.utils import FailedJobError, UncompletedJobError  # noqa: PLC0415 - an extra

        try:
            return list(self._job.results())
        except FailedJobError as error:  # it could not even begin, which Hydra raises once all others are over
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]
        except UncompletedJobError:
            return [JobReturn(status=JobStatus.COMPLETED)]  # it was killed; its folder shows that


@contextmanager
def waited_for() -> Iterator[None]:
    """Let submitit's launcher wait for all of its jobs, where one is killed too; without submitit, nothing changes."""
    if find_spec("submitit") is None:
        yield
        return
    import submitit  # noqa: PLC0415 - an extra

    submit = submitit.AutoExecutor.map_array

    def map_array(executor: Any, *arguments: Any) -> list[Any]:
        return [_Waited(job) for job in submit(executor, *arguments)]

    with patch.object(submitit.AutoExecutor, "map_array", map_array):
        yield
