"""``tracking=mlflow``: logs every search as an MLflow run."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags

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
from evosweep.tracking.describe import describe, layer_table
from evosweep.tracking.mlflow_tracker import view, writes
from evosweep.tracking.mlflow_tracker.continued import RESUME, Logged, close_dead, process_tags, reopened
from evosweep.tracking.mlflow_tracker.figures import generation_figures, result_figures
from evosweep.tracking.mlflow_tracker.model import log_winner
from evosweep.tracking.mlflow_tracker.opening import RUN_ID, given_run, open_experiment
from evosweep.tracking.mlflow_tracker.outbox import Outbox, Write
from evosweep.tracking.mlflow_tracker.parent import MULTIRUN_TAG, find_parent, summarize
from evosweep.tracking.mlflow_tracker.store import (
    UNUSABLE,
    alone,
    connect,
    database_of,
    is_server,
    resolved_uri,
    unusable,
)

HURRY = 2.0  # seconds of further tries after an interruption
SAMPLING = 5  # seconds between looks at processor and memory


class MlflowTracker:
    """Listener that logs a search as an MLflow run.

    Once the run is open, a store that does not answer neither stops nor slows the search: what it did not take is sent
    again later, and at the end ``missing`` says what could not be sent and in which file it is.

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
        self.run_id: str | None = None
        self.missing = ""
        self._name = ""
        self._experiment: str | None = None
        self._multirun = False
        self._problem: Problem | None = None
        self._series = writes.Series()
        self._logged = Logged()
        self._last: GenerationRecord | None = None
        self._folder: Path | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._client: MlflowClient | None = None
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
        """Where the UI shows this run's experiment; None before ``start``."""
        return None if self._experiment is None else view.link(resolved_uri(self.uri), self._experiment)

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

        Raises:
            SettingError: The store cannot be used.
        """
        with alone(self.uri, owner=self):
            self._open_experiment()

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
    ) -> str:
        """Open the run and return its id; jobs of one multirun become children of one parent run.

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

        Raises:
            SettingError: There is no such run, or it is over; or the store cannot be used.
        """
        self._name = name
        self._folder = folder
        self._multirun = multirun is not None
        try:
            with alone(self.uri, owner=self):
                self._open_run(name, tags, multirun, run_id)
        except UNUSABLE as error:
            raise unusable(resolved_uri(self.uri), owner=self, error=error) from error
        assert self._client is not None and self.run_id is not None
        self._outbox = Outbox(self._client)
        if self.run_id in (run_id, os.environ.get(RUN_ID)):
            with suppress(*UNUSABLE):
                self._logged = Logged.of(self._client, self.run_id)
        self._describe(params, config, inputs)
        if self.system_metrics or (self.system_metrics is None and device == "cuda"):
            with suppress(Exception):  # figures about the machine are worth no failure
                self._monitor = SystemMetricsMonitor(
                    self.run_id,
                    sampling_interval=SAMPLING,
                    tracking_uri=self.uri,
                    resume_logging=bool(self._logged.params),
                )
                self._monitor.start()
        return self.run_id

    def _describe(self, params: Mapping[str, str], config: str, inputs: Sequence[TextInput]) -> None:
        """Log what a run is of, but for what it holds already."""
        new = {key: value for key, value in params.items() if key not in self._logged.params}
        if new:
            self._put(writes.params(self._run, new))
        if inputs and not self._logged.inputs:
            self._put(writes.inputs(self._run, inputs))
        if config:
            self._put(writes.text(self._run, config, "config.yaml"))

    def on_event(self, event: Event) -> None:
        """Log a start, a generation, or an end."""
        if isinstance(event, SearchStarted):
            problem = self._problem = event.problem
            self.tag(
                {
                    "units": len(problem.units),
                    "problem": problem.fingerprint,
                    "budget_bits": problem.budget,
                    "budget_bits_per_weight": f"{problem.bits_per_weight(problem.budget):.6f}",
                    **{key: value for key, value in event.facts.items() if key != "mlflow_run"},
                }
            )
        elif isinstance(event, GenerationRecord):
            self._generation(event)
        elif isinstance(event, SearchEnded):
            self._end(event.result)

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Log figures."""
        for write in writes.metrics(self._run, values, step=step):
            self._put(write)

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self._put(writes.tags(self._run, tags))

    def file(self, path: Path) -> None:
        """Log a file as artifact."""
        self._put(writes.file(self._run, path))

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
        self._put(writes.folder(self._run, report))
        self._put(writes.table(self._run, layer_table(result), "allocation_table.json"))
        model = run / "model"
        name = self._name
        run_id = self._run
        if self.model == "weights" and model.is_dir() and "load" in result.export:
            self._put(
                Write(
                    lambda client: log_winner(client, result, run=run_id, name=name, folder=model),
                    {"run": run_id, "model": str(model)},
                )
            )

    def exported(self, run_id: str, row: Mapping[str, Any]) -> None:
        """Add an export to a run that is over; ``row`` is the run's result with the new ``export`` in it."""
        try:
            if self.database is not None and not self.database.is_file():
                raise EvosweepError(f"there is no {self.database}")
            for write in writes.exported(run_id, row):
                write.send(self.client)
        except (*UNUSABLE, EvosweepError) as error:
            self.missing = f"MLflow was not given the export of run {run_id}: {one_line(error)}"

    def close(self, status: str, *, reason: str = "") -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; what was logged stays."""
        if self.run_id is None or self._outbox is None:
            return
        if self._monitor is not None:
            with suppress(Exception):  # as at its start
                self._monitor.finish()
            self._monitor = None
        if reason:
            self.tag({"reason": reason})
        if status != "FINISHED" and self._folder is not None:
            self.tag({RESUME: f"evosweep resume {self._folder}"})
        if self._last is not None:  # no result came; were these metrics, a run that goes on would have each twice
            self.tag({f"{key}_so_far": f"{self._last.validation[key]:.4g}" for key in (KL, PPL)})
        self._put(writes.end(self.run_id, status))
        if self._outbox.flush(*([HURRY] if status == "KILLED" else [])):
            if not self._multirun and self._client is not None and self._experiment is not None:
                with suppress(*UNUSABLE):  # the table is shown with the columns that it had
                    view.refresh(self._client, self._experiment)
            return
        self.missing = self._say_missing()

    def summarize(
        self, multirun: str, *, status: str, files: Sequence[Path], note: str = "", best: Sequence[str] = ()
    ) -> None:
        """Close a multirun's parent run, with the comparison of its jobs; nothing if no job began.

        Args:
            multirun: Its name.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            files: Its comparison as tables and figures.
            note: Its comparison in Markdown.
            best: Run ids of the jobs that were named best, the best of them first.
        """
        try:
            experiment = self._open_experiment()
            summarize(self.client, experiment, multirun, status=status, files=files, note=note, best=best)
        except (*UNUSABLE, SettingError) as error:
            self.missing = f"MLflow has no summary of {multirun!r}: {one_line(error)}"

    def _open_run(self, name: str, tags: Mapping[str, str], multirun: str | None, run_id: str | None) -> None:
        known = {**resolve_tags(), "mlflow.source.name": "evosweep", **process_tags()}
        experiment = self._open_experiment()
        close_dead(self.client, experiment, but=run_id)
        own = {**known, **{key: redact(str(value)) for key, value in tags.items()}}
        if multirun:
            parent = reopened(self.client, find_parent(self.client, experiment, multirun))
            parent = parent or self._make_parent(experiment, multirun, known)
            own["mlflow.parentRunId"] = parent
        given = reopened(self.client, run_id) or (None if multirun else given_run(self.client))
        if given is None:
            self.run_id = str(self.client.create_run(experiment, run_name=name, tags=own).info.run_id)
        else:
            self.run_id = given
            writes.tags(given, own).send(self.client)

    def _make_parent(self, experiment: str, multirun: str, tags: Mapping[str, str]) -> str:
        own = {**tags, MULTIRUN_TAG: multirun}
        given = given_run(self.client)
        if given is None:
            return str(self.client.create_run(experiment, run_name=f"multirun {multirun}", tags=own).info.run_id)
        writes.tags(given, own).send(self.client)
        return given

    def _open_experiment(self) -> str:
        if self._experiment is None:
            if self._client is None:
                self._client = connect(self.uri, owner=self)
            try:
                self._experiment = open_experiment(self._client, self.experiment)
            except UNUSABLE as error:
                raise unusable(resolved_uri(self.uri), owner=self, error=error) from error
        return self._experiment

    @property
    def _run(self) -> str:
        assert self.run_id is not None, "start() comes first"
        return self.run_id

    def _put(self, write: Write) -> None:
        assert self._outbox is not None, "start() comes first"
        self._outbox.put(write)

    def _generation(self, record: GenerationRecord) -> None:
        self._last = record
        found = {"generation": record.generation, "bits": record.cost, "validation": dict(record.validation)}
        content = json.dumps(json_safe({**found, "allocation": dict(record.elite)}), indent=1)
        self._put(writes.text(self._run, content, f"generations/{record.generation:04d}/allocation.json"))
        for step, values in sorted(self._series.add(generation_figures(record), record.generation).items()):
            self.metrics(self._logged.missing(values, step), step=step)
        changed = (record.changed or record.generation == 0) and record.generation not in self._logged.pictures
        if self.images and self._problem is not None and changed:
            pixels = level_image(self._problem, record.elite)
            self._put(writes.picture(self._run, pixels, key="levels", step=record.generation))

    def _end(self, result: SearchResult) -> None:
        row = result.row()
        self._last = None
        self.metrics({**result_figures(row), **writes.finish_figures(result.finish)})
        self.tag({view.NOTE_TAG: describe(result), "dense_ppl": f"{result.dense['ppl']:.4f}"})
        if result.export:
            self.tag({f"export.{key}": value for key, value in result.export.items()})
        for name, value in (
            ("allocation.json", {**row, "allocation": dict(result.allocation)}),
            ("result.json", row),
        ):
            self._put(writes.text(self._run, json.dumps(json_safe(value), indent=1, ensure_ascii=False), name))

    def _say_missing(self) -> str:
        assert self._outbox is not None
        left = len(self._outbox.left())
        path = None if self._folder is None else self._outbox.save(self._folder)
        where = "" if path is None else f"; it is in {path}"
        return (
            f"MLflow ({redact(resolved_uri(self.uri))}) did not take {left} of {left + self._outbox.sent} writes of "
            f"run {self.run_id}, which may be shown as running: {self._outbox.reason}{where}"
        )
