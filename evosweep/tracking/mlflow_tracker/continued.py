"""Runs that go on after a stop: what MLflow has of them already, and runs whose process died without closing them."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

HOST = "evosweep.host"
PROCESS = "evosweep.process"
RESUME = "resume"  # tag: the command that goes on with a run
PICTURE_STEP = re.compile(r"[+%]step[+%](\d+)[+%]")  # + since MLflow 3.10
MOST_RUNS = 200
RUNNING = "RUNNING"


@dataclass(frozen=True)
class Logged:
    """What a run holds already.

    Attributes:
        params: Its params.
        inputs: Whether it has datasets.
        steps: Steps of every metric.
        pictures: Steps that have a picture.
    """

    params: Mapping[str, str] = field(default_factory=dict)
    inputs: bool = False
    steps: Mapping[str, frozenset[int]] = field(default_factory=dict)
    pictures: frozenset[int] = frozenset()

    @classmethod
    def of(cls, client: MlflowClient, run_id: str) -> "Logged":
        """Return what a run holds.

        Raises:
            MlflowException: There is no such run, or the store does not answer.
        """
        run = client.get_run(run_id)
        steps = {
            key: frozenset(point.step for point in client.get_metric_history(run_id, key)) for key in run.data.metrics
        }
        found = (PICTURE_STEP.search(item.path) for item in client.list_artifacts(run_id, "images"))
        return cls(
            params=run.data.params,
            inputs=bool(run.inputs and run.inputs.dataset_inputs),
            steps=steps,
            pictures=frozenset(int(match.group(1)) for match in found if match),
        )

    def missing(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Return the figures of a step that the run does not hold yet."""
        return {key: value for key, value in values.items() if step not in self.steps.get(key, ())}


def process_tags() -> dict[str, str]:
    """Return the tags that name this process: its machine, its id and when it began."""
    return {HOST: socket.gethostname(), PROCESS: _name(os.getpid())}


def reopened(client: MlflowClient, run_id: str | None) -> str | None:
    """Return a run set to running again; None where there is none, or none any longer."""
    if run_id is None:
        return None
    try:
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            return None
        client.update_run(run_id, status=RUNNING)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run_id


def close_dead(client: MlflowClient, experiment: str, *, but: str | None = None) -> None:
    """End the runs of an experiment as killed whose process, on this machine, is no more.

    Args:
        client: Of the store.
        experiment: Its id.
        but: A run that is about to go on.
    """
    mine = f"attributes.status = '{RUNNING}' and tags.`{HOST}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment], filter_string=mine, max_results=MOST_RUNS):
        tags = run.data.tags
        run_id = run.info.run_id
        if run_id == but or not tags.get(PROCESS) or _alive(tags[PROCESS]):
            continue
        folder = tags.get("folder")
        reason = [RunTag("reason", "its process ended without closing it")]
        how = [RunTag(RESUME, f"evosweep resume {folder}")] if folder else []
        client.log_batch(run_id, tags=[*reason, *how])
        client.set_terminated(run_id, status="KILLED")


def _name(process: int) -> str:
    return f"{process} {psutil.Process(process).create_time():.0f}"


def _alive(name: str) -> bool:
    """Return whether the process of a tag is still there, and not another one of its number."""
    try:
        return _name(int(name.split(maxsplit=1)[0])) == name
    except (psutil.Error, ValueError):
        return False
