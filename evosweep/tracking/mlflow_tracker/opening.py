"""Opens an experiment and the run that a search is logged to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.tracking.mlflow_tracker import view
from evosweep.tracking.mlflow_tracker.continued import Logged, close_dead, reopened
from evosweep.tracking.mlflow_tracker.parent import MULTIRUN_TAG, find_parent
from evosweep.tracking.mlflow_tracker.writes import RUN_ID

OPENING = "evosweep.opening"  # tag: which opening made the run, so that it is not made twice
STATES = ("RUNNING", "SCHEDULED")


@dataclass(frozen=True)
class Opened:
    """A run that can be written to.

    Attributes:
        experiment: Its experiment's id.
        run: Its id.
        logged: What it holds already.
    """

    experiment: str
    run: str
    logged: Logged = field(default_factory=Logged)


def open_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, created if it is not there.

    Raises:
        EvosweepError: It was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, tags=view.experiment_tags()))
    if found.lifecycle_stage == "deleted":
        raise EvosweepError(
            f"the MLflow experiment {name!r} was deleted: choose another name=..., or type "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    for key, value in view.experiment_tags().items():
        if key not in found.tags:
            client.set_experiment_tag(str(found.experiment_id), key, value)
    return str(found.experiment_id)


def open_run(client: MlflowClient, content: Mapping[str, Any]) -> Opened:
    """Open the run of a write: the one that goes on, the one that the environment named, or a new one.

    Args:
        client: Of the store.
        content: ``experiment``, ``name``, ``tags`` and ``process`` (tags of a multirun's parent, too), ``key`` of this
            opening, ``time``; ``run`` that goes on, ``folder`` to find it by, ``given`` by the environment, and
            ``multirun``: None where there is none.

    Raises:
        EvosweepError: The experiment was deleted, or there is no such run, or it is over.
    """
    experiment = open_experiment(client, content["experiment"])
    before = content["run"] or (
        _last_of(client, experiment, "folder", content["folder"]) if content["folder"] else None
    )
    close_dead(client, experiment, but=before)
    tags = {**content["process"], **content["tags"], OPENING: content["key"]}
    multirun = content["multirun"]
    if multirun:
        tags[view.PARENT_TAG] = _parent(client, experiment, multirun, content)
    made = _last_of(client, experiment, OPENING, content["key"])
    run = made or reopened(client, before) or (None if multirun else given_run(client, content["given"]))
    if run is None:
        new = client.create_run(experiment, run_name=content["name"], tags=tags, start_time=content["time"])
        return Opened(experiment, str(new.info.run_id))
    if run != made:
        client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
    return Opened(experiment, run, Logged.of(client, run))


def _parent(client: MlflowClient, experiment: str, multirun: str, content: Mapping[str, Any]) -> str:
    """Return the parent run of a multirun: its own, the one that the environment named, or a new one."""
    parent = reopened(client, find_parent(client, experiment, multirun))
    if parent is not None:
        return parent
    tags = {**content["process"], MULTIRUN_TAG: multirun}
    given = given_run(client, content["given"])
    if given is None:
        made = client.create_run(experiment, run_name=f"multirun {multirun}", tags=tags, start_time=content["time"])
        return str(made.info.run_id)
    client.log_batch(given, tags=[RunTag(key, value) for key, value in tags.items()])
    return given


def _last_of(client: MlflowClient, experiment: str, tag: str, value: str) -> str | None:
    """Return the newest run of an experiment with a tag of this value."""
    quote = '"' if "'" in value else "'"
    found = client.search_runs([experiment], filter_string=f"tags.`{tag}` = {quote}{value}{quote}", max_results=1)
    return str(found[0].info.run_id) if found else None


def given_run(client: MlflowClient, name: str | None) -> str | None:
    """Return the run that the environment names, if any.

    Args:
        client: Of the store.
        name: Value of ``MLFLOW_RUN_ID``.

    Raises:
        SettingError: There is no such run, or it is over.
    """
    if not name:
        return None
    try:
        status = client.get_run(name).info.status
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SettingError(RUN_ID, allowed="a run of this store", got=name, hint="or unset it") from error
    if status not in STATES:
        raise SettingError(
            RUN_ID,
            allowed="a run that is not over",
            got=f"{name}, which is {status}",
            hint=f"unset {RUN_ID} to log a new one",
        )
    return name
