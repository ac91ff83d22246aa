"""``tracking=mlflow``: logs every search as an MLflow run."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from mlflow import MlflowClient
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from evosweep.core.checks import check_bool, check_choice
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Event, GenerationRecord, SearchEnded, SearchResult, SearchStarted
from evosweep.core.files import json_safe
from evosweep.core.metrics import KL, PPL
from evosweep.core.problem import Problem
from evosweep.core.redact import redact
from evosweep.tracking.artifacts.heatmap import level_image
from evosweep.tracking.base import TextInput
from evosweep.tracking.behind import one_line
from evosweep.tracking.describe import layer_table
from evosweep.tracking.mlflow_tracker import view, writes
from evosweep.tracking.mlflow_tracker.continued import RESUME
from evosweep.tracking.mlflow_tracker.delivery import Delivery, refuses
from evosweep.tracking.mlflow_tracker.figures import generation_figures
from evosweep.tracking.mlflow_tracker.opening import open_experiment
from evosweep.tracking.mlflow_tracker.outbox import LAST, MOST, PAUSE, Outbox
from evosweep.tracking.mlflow_tracker.result import result_writes
from evosweep.tracking.mlflow_tracker.spool import Spool, Write
from evosweep.tracking.mlflow_tracker.store import (
    LOCK,
    UNUSABLE,
    alone,
    answered,
    connect,
    database_of,
    hint,
    is_server,
    resolved_uri,
    unusable,
)

START = 3.0  # seconds that a server may take before the search begins without it
OPENING = 30.0  # seconds that a database may take, beside waiting for other processes
LOCAL = 20.0  # seconds without a delivery, at the end of a run, after which a database is given up
HURRY = 2.0  # seconds of further tries after an interruption
SAMPLING = 5  # seconds between looks at processor and memory


class MlflowTracker:
    """Listener that logs a search as an MLflow run.

    A server that does not answer, be it from the start, neither stops nor slows the search: what it does not take is
    kept in the run's folder and delivered in order when it answers. At the end ``missing`` says what was not delivered,
    and ``evosweep sync`` delivers it.

    Args:
        experiment: Name of the MLflow experiment.
        uri: Tracking URI; null is MLflow's own default, ``mlflow.db`` and ``mlruns/`` in the working folder unless
            ``MLFLOW_TRACKING_URI`` says otherwise.
        system_metrics: Log processor, memory and (with pynvml) GPU use; null: where the model is on a GPU.
        images: Log the elite's levels as a picture whenever they change; the UI plays them by generation.
        model: ``weights`` logs the exported winner as a model that ``mlflow.pyfunc`` loads; ``none`` logs no model. The
            run holds ``allocation.json`` and ``config.yaml`` in any case.
    """

    def __init__(
        self,
        *,
        experiment: str,
        uri: str | None = None,
        system_metrics: bool | None = None,
        images: bool = True,
        model: str = "none",
    ) -> None:
        if not isinstance(experiment, str) or not experiment:
            raise SettingError("experiment", allowed="the name of an MLflow experiment", got=experiment)
        if uri is not None and not (isinstance(uri, str) and uri):
            raise SettingError("uri", allowed="an MLflow tracking URI, or null for MLflow's default", got=uri)
        self.experiment = experiment
        self.uri = uri
        self.system_metrics = None if system_metrics is None else check_bool("system_metrics", system_metrics)
        self.images = check_bool("images", images)
        self.model = check_choice("model", model, ("weights", "none"))
        self.missing = ""
        self.away = ""
        self._name = ""
        self._experiment: str | None = None
        self._multirun = False
        self._problem: Problem | None = None
        self._facts: dict[str, float] = {}  # of the search, that are metrics
        self._series = writes.Series()
        self._last: GenerationRecord | None = None
        self._folder: Path | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._client: MlflowClient | None = None
        self._delivery: Delivery | None = None
        self._outbox: Outbox | None = None

    dataset = staticmethod(TextInput)

    @property
    def client(self) -> MlflowClient:
        """The client; a database that is not there yet is created at first use."""
        if self._client is None:
            with alone(self.uri, owner=self):
                self._client = connect(self.uri, owner=self)
        return self._client

    @property
    def database(self) -> Path | None:
        """The SQLite file that runs are kept in; None for a server or another database."""
        return database_of(resolved_uri(self.uri))

    @property
    def link(self) -> str | None:
        """Where the UI shows this run's experiment; None where that is not known yet."""
        opened = None if self._delivery is None else self._delivery.opened
        experiment = opened.experiment if opened else self._experiment
        return None if experiment is None else view.link(resolved_uri(self.uri), experiment)

    @property
    def run_id(self) -> str | None:
        """Id of the run; None before the store has opened it."""
        opened = None if self._delivery is None else self._delivery.opened
        return opened.run if opened else None

    @property
    def command(self) -> str:
        """Command that serves ``link``; empty for a server, which runs already."""
        used = resolved_uri(self.uri)
        if is_server(used):
            return ""
        default = self.uri is None and "MLFLOW_TRACKING_URI" not in os.environ
        return "mlflow ui" if default else f"mlflow ui --backend-store-uri {redact(used)}"

    def check(self) -> None:
        """Create the database and the experiment where they are not there.

        A server that does not answer is no error: ``away`` says so, and the run is opened when it does.

        Raises:
            SettingError: The store cannot be used.
            EvosweepError: The experiment was deleted.
        """
        used = resolved_uri(self.uri)
        if not is_server(used):
            try:
                with alone(self.uri, owner=self):
                    self._client = self._client or connect(self.uri, owner=self)
                    self._experiment = self._experiment_of(self._client)
            except UNUSABLE as error:
                raise unusable(used, owner=self, error=error) from error
            return
        client = self.client
        try:
            self._experiment = answered(lambda: self._experiment_of(client), seconds=START)
        except UNUSABLE as error:
            if refuses(error):
                raise unusable(used, owner=self, error=error) from error
            self.away = f"MLflow ({redact(used)}) does not answer: {redact(hint(error, used))}"

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        config: str = "",
        multirun: str | None = None,
        inputs: Sequence[TextInput] = (),
        device: str = "cpu",
        folder: Path | None = None,
        run_id: str | None = None,
        resumed: bool = False,
    ) -> str | None:
        """Open the run and return its id; jobs of one multirun become children of one parent run.

        Where a server does not answer, the run is opened once it does, and the id is not known until then.

        A run that ``MLFLOW_RUN_ID`` names is gone on with: by a single job, or as the parent of a multirun. Params that
        such a run has already stay as they are.

        Args:
            name: Shown to users.
            params: What was chosen.
            tags: What else is known.
            config: The whole configuration as YAML.
            multirun: Name of the multirun that this run is a job of.
            inputs: Texts that were used, as datasets.
            device: ``cuda`` lets system metrics be logged.
            folder: The run's folder; what MLflow does not take is written there.
            run_id: A run to go on with; what it has of each generation is not logged again.
            resumed: Whether the run goes on; without ``run_id`` it is found by its folder, if MLflow knows it.

        Raises:
            SettingError: There is no such run, or it is over; or the store cannot be used.
        """
        self._name = name
        self._folder = folder
        self._multirun = multirun is not None
        server = is_server(resolved_uri(self.uri))
        self._delivery = Delivery(self.client)
        self._outbox = self._new_outbox(self._delivery, folder)
        self._put(
            writes.opening(
                self.experiment,
                name=name,
                tags=tags,
                multirun=multirun,
                run=run_id,
                folder=tags.get("folder") if resumed and run_id is None else None,
            )
        )
        self._describe(params, config, inputs)
        self._outbox.settle(START if server else LOCK + OPENING)
        if self._outbox.refused is not None:
            self._refuse(self._outbox.refused)
        self._watch(device)
        return self.run_id

    def _new_outbox(self, delivery: Delivery, folder: Path | None) -> Outbox:
        server = is_server(resolved_uri(self.uri))
        quiet = PAUSE if self.away else 0.0
        return Outbox(delivery, folder=folder, patient=server, quiet=quiet, guard=lambda: alone(self.uri, owner=self))

    def _refuse(self, error: Exception) -> NoReturn:
        """Raise the error of a run that cannot be opened, and forget the run."""
        assert self._outbox is not None
        self._outbox.end()
        self._outbox.spool.replace([])
        self._outbox = None
        if isinstance(error, UNUSABLE):
            raise unusable(resolved_uri(self.uri), owner=self, error=error) from error
        raise error

    def _watch(self, device: str) -> None:
        """Log the machine's figures, where they are asked for and the run is known."""
        if self.run_id is None or not (self.system_metrics or (self.system_metrics is None and device == "cuda")):
            return
        with suppress(Exception):  # figures about the machine are worth no failure
            self._monitor = SystemMetricsMonitor(
                self.run_id,
                sampling_interval=SAMPLING,
                tracking_uri=self.uri,
                resume_logging=bool(self._delivery and self._delivery.opened and self._delivery.opened.logged.params),
            )
            self._monitor.start()

    def _describe(self, params: Mapping[str, str], config: str, inputs: Sequence[TextInput]) -> None:
        """Log what a run is of, but for what it holds already."""
        found = [writes.params(params)] if params else []
        found += [writes.inputs(inputs)] if inputs else []
        found += [writes.text(config, "config.yaml")] if config else []
        for write in found:
            self._put(write)

    def on_event(self, event: Event) -> None:
        """Log a start, a generation, or an end."""
        if isinstance(event, SearchStarted):
            self._problem = event.problem
            self._put(writes.started(event.problem, event.facts))
            self._facts = writes.fact_figures(event.facts)
        elif isinstance(event, GenerationRecord):
            self._generation(event)
        elif isinstance(event, SearchEnded):
            self._end(event.result)
            self.metrics(self._facts)  # behind the result's own, of which MLflow's comparison shows the first

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Log figures."""
        for write in writes.metrics(values, step=step):
            self._put(write)

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self._put(writes.tags(tags))

    def file(self, path: Path) -> None:
        """Log a file as artifact."""
        self._put(writes.file(path))

    def deliver(self, result: SearchResult, *, report: Path, run: Path, trial: int | None) -> None:
        """Log the report, a table of layers and, if asked for, the exported winner as a model.

        Args:
            result: Of the search.
            report: Folder of figures.
            run: The run's folder: ``allocation.json``, ``config.yaml``, and ``model/`` if the winner was exported.
            trial: Number of the winner's trial in the study.
        """
        if trial is not None:
            self.tag({"trial": trial})
        self._put(writes.folder(report))
        self._put(writes.table(layer_table(result), "allocation_table.json"))
        model = run / "model"
        wanted = self.model == "weights" or result.export.get("register")
        if wanted and model.is_dir() and "load" in result.export:
            self._put(writes.model(result.row(), result.export, name=self._name, path=model))

    def exported(self, run_id: str, row: Mapping[str, Any]) -> None:
        """Add an export to a run that is over; ``row`` is the run's result with the new ``export`` in it."""
        try:
            if self.database is not None and not self.database.is_file():
                raise EvosweepError(f"there is no {self.database}")
            delivery = Delivery(self.client)
            for write in writes.exported(row):
                delivery.send(replace(write, run=run_id))
        except (*UNUSABLE, EvosweepError) as error:
            self.missing = f"MLflow was not given the export of run {run_id}: {one_line(error)}"

    def close(self, status: str, *, reason: str = "") -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; what was logged stays."""
        if self._outbox is None:
            return
        if self._monitor is not None:
            with suppress(Exception):  # as at its start
                answered(self._monitor.finish, seconds=HURRY)
            self._monitor = None
        if reason:
            self.tag({"reason": reason})
        if status != "FINISHED" and self._folder is not None:
            self.tag({RESUME: f"evosweep resume {self._folder}"})
        if self._last is not None:  # no result came; were these metrics, a run that goes on would have each twice
            self.tag({f"{key}_so_far": f"{self._last.validation[key]:.4g}" for key in (KL, PPL)})
        self._put(writes.end(status))
        if not self._multirun:
            self._put(Write("table", {}))
        patience = LOCAL if self.database is not None else LAST
        killed = status == "KILLED"
        done = self._outbox.flush(HURRY if killed else patience, uploads=not killed)
        path = self._outbox.end()
        if not done:
            self.missing = self._outbox.missing(redact(resolved_uri(self.uri)), path)

    def summarize(
        self,
        multirun: str,
        *,
        status: str,
        files: Sequence[Path],
        note: str = "",
        best: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        """Close a multirun's parent run, with the comparison of its jobs; nothing if no job began.

        Args:
            multirun: Its name.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            files: Its comparison as tables and figures.
            note: Its comparison in Markdown.
            best: Run ids or folders of the jobs that were named best, the best of them first.
            folder: Of the multirun; a summary that MLflow does not take is kept there.
        """
        write = writes.summary(self.experiment, multirun, status=status, files=files, note=note, best=best)
        try:
            if is_server(resolved_uri(self.uri)):  # one that is away is found out in a few seconds
                self.check()
                if self.away:
                    raise TimeoutError(self.away)
            delivery = Delivery(self.client)
            answered(lambda: delivery.send(write), seconds=MOST)
        except (*UNUSABLE, EvosweepError) as error:
            self.missing = f"MLflow has no summary of {multirun!r}: {one_line(error)}"
            if folder is not None:
                Spool(folder).append([write])
                self.missing += f"; to deliver it: evosweep sync {folder}"

    def _experiment_of(self, client: MlflowClient) -> str:
        return self._experiment or open_experiment(client, self.experiment)

    def _put(self, write: Write) -> None:
        assert self._outbox is not None, "start() comes first"
        self._outbox.put(write)

    def _generation(self, record: GenerationRecord) -> None:
        self._last = record
        found = {"generation": record.generation, "bits": record.cost, "validation": dict(record.validation)}
        content = json.dumps(json_safe({**found, "allocation": dict(record.elite)}), indent=1)
        self._put(writes.text(content, f"generations/{record.generation:04d}/allocation.json"))
        for step, values in sorted(self._series.add(generation_figures(record), record.generation).items()):
            self.metrics(values, step=step)
        changed = record.changed or record.generation == 0
        if self.images and self._problem is not None and changed:
            pixels = level_image(self._problem, record.elite)
            self._put(writes.picture(pixels, key="levels", step=record.generation))

    def _end(self, result: SearchResult) -> None:
        self._last = None
        for write in result_writes(result):
            self._put(write)
