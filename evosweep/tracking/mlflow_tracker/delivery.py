"""Delivers writes to MLflow: each kind by one function, a second delivery of the same write changing nothing."""

import base64
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.multimedia import compress_image_size
from PIL import Image

from evosweep.core.errors import EvosweepError
from evosweep.tracking.mlflow_tracker import view
from evosweep.tracking.mlflow_tracker.continued import Logged
from evosweep.tracking.mlflow_tracker.model import log_winner
from evosweep.tracking.mlflow_tracker.opening import Opened, open_experiment, open_run
from evosweep.tracking.mlflow_tracker.parent import summarize
from evosweep.tracking.mlflow_tracker.spool import OPEN, SUMMARY, Write
from evosweep.tracking.mlflow_tracker.store import UNREACHABLE

IMAGES = "mlflow.loggedImages"  # tag of a run with pictures
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
WRONG = {"ENDPOINT_NOT_FOUND", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}  # another kind of server, no credentials
LATER = {401, 403, 408, 429}  # statuses of requests that may be taken another time
Content = Mapping[str, Any]


class Delivery:
    """Delivers writes in order; keeps what a run that goes on holds already, so that it is not logged again.

    Args:
        client: Of the store.
    """

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.opened: Opened | None = None

    def send(self, write: Write) -> None:
        """Deliver a write.

        Raises:
            Exception: Whatever MLflow raises where the store does not take it.
        """
        if write.kind == OPEN:
            self.opened = open_run(self.client, write.content)
            return
        if write.kind == SUMMARY:
            _summarize(self.client, write.content)
            return
        if write.kind not in KINDS:
            raise EvosweepError(f"there is no kind of write {write.kind!r}")
        run = self.run_of(write)
        if run is None:
            raise EvosweepError("its run was not opened")
        KINDS[write.kind](self.client, run, write.content, self._logged(run))

    def run_of(self, write: Write) -> str | None:
        """Return the id of a write's run; None where it is not known yet."""
        if write.run is not None:
            return write.run
        return None if self.opened is None else self.opened.run

    def _logged(self, run: str) -> Logged:
        return self.opened.logged if self.opened is not None and self.opened.run == run else Logged()


def refuses(error: BaseException) -> bool:
    """Return whether a server's answer says that the settings are wrong, rather than the network or the server."""
    if isinstance(error, ImportError):
        return True
    return isinstance(error, MlflowException) and error.error_code in REFUSED | WRONG


def store_is_away(error: Exception) -> bool:
    """Return whether the next write would fail as well: the store is silent, locked or refuses everything."""
    if isinstance(error, MlflowException) and error.error_code in REFUSED:
        return False
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in LATER
    return isinstance(error, UNREACHABLE)


def _summarize(client: MlflowClient, content: Content) -> None:
    experiment = open_experiment(client, content["experiment"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / Path(name).name for name in content["files"]]
        for path, data in zip(files, content["files"].values(), strict=True):
            path.write_bytes(base64.b64decode(data))
        summarize(
            client,
            experiment,
            content["multirun"],
            status=content["status"],
            files=files,
            note=content["note"],
            best=content["best"],
        )


def _metrics(client: MlflowClient, run: str, content: Content, logged: Logged) -> None:
    step = content["step"]
    made = [Metric(key, value, content["time"], step) for key, value in logged.missing(content["values"], step).items()]
    if made:
        client.log_batch(run, metrics=made)


def _params(client: MlflowClient, run: str, content: Content, logged: Logged) -> None:
    made = [Param(key, value) for key, value in content["values"].items() if key not in logged.params]
    if made:
        client.log_batch(run, params=made)


def _tags(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    client.log_batch(run, tags=[RunTag(key, value) for key, value in content["values"].items()])


def _text(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    client.log_text(run, content["text"], content["path"])


def _picture(client: MlflowClient, run: str, content: Content, logged: Logged) -> None:
    """Log a picture as ``MlflowClient.log_image`` does, under a name that a second delivery has as well."""
    if content["step"] in logged.pictures:
        return
    name = f"{content['key']}+step+{content['step']}+timestamp+{content['time']}+{content['id']}"
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / f"{name}.png"
        small = Path(folder) / f"{name}+compressed.webp"
        full.write_bytes(base64.b64decode(content["png"]))
        with Image.open(full) as picture:
            compress_image_size(picture).save(small)
        client.log_artifact(run, str(full), "images")
        client.log_artifact(run, str(small), "images")
    client.set_tag(run, IMAGES, "True")


def _file(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    client.log_artifact(run, content["path"])


def _folder(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    client.log_artifacts(run, content["path"])


def _inputs(client: MlflowClient, run: str, content: Content, logged: Logged) -> None:
    if logged.inputs:
        return
    made = [
        DatasetInput(
            Dataset(
                name=one["name"],
                digest=one["digest"],
                source_type="text",
                source=one["source"],
                profile=json.dumps({"tokens": one["tokens"]}),
            ),
            tags=[InputTag("mlflow.data.context", one["context"])],
        )
        for one in content["texts"]
    ]
    client.log_inputs(run, made)


def _model(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    log_winner(
        client,
        run=run,
        name=content["name"],
        folder=Path(content["path"]),
        load=content["load"],
        params=content["params"],
        register=content.get("register"),
    )


def _end(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    client.set_terminated(run, status=content["status"], end_time=content["time"])


def _table(client: MlflowClient, run: str, content: Content, _: Logged) -> None:
    del content
    with suppress(*UNREACHABLE):  # the table of runs is shown with the columns that it had
        view.refresh(client, str(client.get_run(run).info.experiment_id))


KINDS: dict[str, Callable[[MlflowClient, str, Content, Logged], None]] = {
    "metrics": _metrics,
    "params": _params,
    "tags": _tags,
    "text": _text,
    "picture": _picture,
    "file": _file,
    "folder": _folder,
    "inputs": _inputs,
    "model": _model,
    "end": _end,
    "table": _table,
}
