"""Delivers what a run could not log while its MLflow server was away."""

from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient

from evosweep.core.results import RESULT
from evosweep.tracking.behind import one_line
from evosweep.tracking.mlflow_tracker import writes
from evosweep.tracking.mlflow_tracker.delivery import Delivery, store_is_away
from evosweep.tracking.mlflow_tracker.spool import OPEN, SUMMARY, Spool, Write


@dataclass(frozen=True)
class Synced:
    """What a delivery came to.

    Attributes:
        sent: Writes that were delivered.
        left: Writes that were not.
        reason: Why not, in one line.
        run: Id of the run, if it is known.
    """

    sent: int
    left: int
    reason: str
    run: str | None


def sync(folder: Path, client: MlflowClient) -> Synced:
    """Deliver the writes that wait in a folder, in order, and end their run; those not delivered stay there.

    Doing it again, or after it was killed halfway, changes nothing that is delivered already.

    Args:
        folder: Of a run that no process works on, or of a multirun.
        client: Of the store.

    Raises:
        EvosweepError: The file of waiting writes is damaged.
    """
    spool = Spool(folder)
    found = spool.read()
    if found and not any(write.kind in ("end", SUMMARY) for write in found):  # the process was killed
        found.append(writes.end("FINISHED" if (folder / RESULT).is_file() else "KILLED"))
        found[-1] = replace(found[-1], run=next((write.run for write in reversed(found) if write.run), None))
    delivery = Delivery(client)
    done: set[int] = set()
    reason = ""
    try:
        for index, write in enumerate(found):
            try:
                delivery.send(write)
                done.add(index)
            except Exception as error:
                reason = reason or one_line(error)
                if store_is_away(error) or write.kind == OPEN:
                    break
    finally:
        left = [_named(write, delivery) for index, write in enumerate(found) if index not in done]
        spool.replace(left)
    run = next((delivery.run_of(write) for write in reversed(found) if write.kind != SUMMARY), None)
    return Synced(len(done), len(left), reason, run)


def _named(write: Write, delivery: Delivery) -> Write:
    return write if write.kind == OPEN else replace(write, run=delivery.run_of(write))
