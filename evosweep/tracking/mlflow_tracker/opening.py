"""Opens an experiment, and the run that the environment names."""

import os

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.tracking.mlflow_tracker import view

RUN_ID = "MLFLOW_RUN_ID"  # environment: MLflow's own name for a run to go on with
OPEN = ("RUNNING", "SCHEDULED")


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


def given_run(client: MlflowClient) -> str | None:
    """Return the run that the environment names, if any.

    Raises:
        SettingError: There is no such run, or it is over.
    """
    name = os.environ.get(RUN_ID)
    if not name:
        return None
    try:
        status = client.get_run(name).info.status
    except MlflowException as error:
        raise SettingError(RUN_ID, allowed="a run of this store", got=name, hint="or unset it") from error
    if status not in OPEN:
        raise SettingError(
            RUN_ID,
            allowed="a run that is not over",
            got=f"{name}, which is {status}",
            hint=f"unset {RUN_ID} to log a new one",
        )
    return name
