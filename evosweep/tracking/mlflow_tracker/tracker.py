"""MLflow: one run a search, every generation a step."""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from alembic.util import CommandError
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from sqlalchemy.exc import SQLAlchemyError

from evosweep.assets.cache import cache_folder
from evosweep.core.checks import check_bool, check_choice
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Event, GenerationRecord, SearchEnded, SearchResult, SearchStarted
from evosweep.core.files import digest, write_json
from evosweep.core.problem import Problem
from evosweep.tracking.artifacts.heatmap import level_image
from evosweep.tracking.describe import describe, layer_table, loading

PARAM_LENGTH = 6000
BATCH = 1000
PATIENCE = 300  # seconds to wait for another process that makes the database
SAMPLING = 5  # seconds between looks at processor and memory
TAG_LENGTH = 5000
MULTIRUN_TAG = "evosweep.multirun"
RUN_ID = "MLFLOW_RUN_ID"  # environment: MLflow's own name for a run to go on with
OPEN = ("RUNNING", "SCHEDULED")
UNUSABLE = (MlflowException, OSError, SQLAlchemyError, CommandError, ImportError)  # what a bad URI may end in
UI = "http://127.0.0.1:5000"  # where mlflow ui listens unless told otherwise
NOTE_TAG = "mlflow.note.content"  # what the UI shows as the run's description
KIND_TAG = "mlflow.experimentKind"  # which pages the UI opens with; its guess is evaluation of agents
VIEW = "evosweep"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"  # a view of the runs' table that a link can name
SHOWN_PARAMS = ("sampler", "budget", "compressor", "seed")
SHOWN_METRICS = (
    "result/kl",
    "result/ppl",
    "result/bits_per_weight",
    "result/size_mb",
    "result/tokens",
    "result/seconds",
)


class MlflowTracker:
    """Listener that logs a search as an MLflow run.

    Args:
        experiment: Name of the MLflow experiment.
        uri: Tracking URI; null is MLflow's own default, ``mlflow.db`` and ``mlruns/`` in the working folder unless
            ``MLFLOW_TRACKING_URI`` says otherwise.
        system_metrics: Log processor, memory and (with pynvml) GPU use.
        images: Log the elite's levels as a picture whenever they change; the UI plays them by generation.
        model: What the winner's logged model holds: ``recipe`` (allocation and settings), ``weights`` (also the
            exported model, if there is one), or ``none`` for no logged model.
    """

    def __init__(
        self,
        *,
        experiment: str,
        uri: str | None = None,
        system_metrics: bool = True,
        images: bool = True,
        model: str = "recipe",
    ) -> None:
        if not isinstance(experiment, str) or not experiment:
            raise SettingError("experiment", allowed="the name of an MLflow experiment", got=experiment)
        self.experiment, self.uri = experiment, uri
        self.system_metrics = check_bool("system_metrics", system_metrics)
        self.images = check_bool("images", images)
        self.model = check_choice("model", model, ("recipe", "weights", "none"))
        self.run_id: str | None = None
        self._problem: Problem | None = None
        self._facts: dict[str, Any] = {}
        self._monitor: SystemMetricsMonitor | None = None
        self._client: MlflowClient | None = None

    @staticmethod
    def dataset(*, name: str, digest: str, source: str, context: str, tokens: int) -> DatasetInput:
        """Return an input of a run, as the UI lists them: a split of the text."""
        profile = json.dumps({"tokens": tokens})
        made = Dataset(name=name, digest=digest[:36], source_type="text", source=source, profile=profile)
        return DatasetInput(made, tags=[InputTag("mlflow.data.context", context)])

    @property
    def client(self) -> MlflowClient:
        """The client, made at first use: making it creates the database."""
        if self._client is None:
            logging.getLogger("mlflow").setLevel(logging.ERROR)
            logging.getLogger("alembic").setLevel(logging.ERROR)
            try:
                self._client = MlflowClient(tracking_uri=self.uri)
            except UNUSABLE as error:
                raise SettingError(
                    "uri",
                    owner=self,
                    allowed="an MLflow tracking URI that can be written, as sqlite:///mlflow.db",
                    got=self.uri or resolved_uri(),
                    hint=_hint(error),
                ) from error
        return self._client

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config: str = "",
        multirun: str | None = None,
        inputs: Sequence[DatasetInput] = (),
    ) -> str:
        """Open the run and return its id; jobs of one multirun become children of one parent run.

        A run that ``MLFLOW_RUN_ID`` names is gone on with: by a single job, or as the parent of a multirun.

        Raises:
            SettingError: There is no such run, or it is over; or the store cannot be used.
        """
        tags = {**resolve_tags(), **tags, "mlflow.source.name": "evosweep"}
        with self._first():
            experiment = self._experiment_id()
            if multirun:
                tags["mlflow.parentRunId"] = self._parent(multirun)
            given = None if multirun else self._given()
            self.run_id = given or str(self.client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        if given:
            self.tag(tags)
        written = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()]
        for start in range(0, len(written), 100):
            self.client.log_batch(self.run_id, params=written[start : start + 100])
        if inputs:
            self.client.log_inputs(self.run_id, inputs)
        if self.system_metrics:
            self._monitor = SystemMetricsMonitor(self.run_id, sampling_interval=SAMPLING, tracking_uri=self.uri)
            self._monitor.start()
        if config:
            self.client.log_text(self.run_id, config, "config.yaml")
        return self.run_id

    def on_event(self, event: Event) -> None:
        """Log a start, a generation, or an end."""
        if isinstance(event, SearchStarted):
            problem, self._facts = event.problem, dict(event.facts)
            self._problem = problem
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

    def metrics(self, values: Mapping[str, float], *, step: int = 0, model: str | None = None) -> None:
        """Log numbers in one batch; with the id of a logged model, as that model's too."""
        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step, model_id=model) for key, value in values.items()]
        for start in range(0, len(batch), BATCH):
            self.client.log_batch(self._run, metrics=batch[start : start + BATCH])

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags in one batch."""
        written = [RunTag(key, str(value)[:TAG_LENGTH]) for key, value in tags.items()]
        self.client.log_batch(self._run, tags=written)

    def file(self, path: Path) -> None:
        """Log a file as artifact."""
        self.client.log_artifact(self._run, str(path))

    def deliver(self, result: SearchResult, *, report: Path, run: Path, trial: int | None) -> None:
        """Log what a search leaves in the end: its figures, its report, a table of layers, the winner as a model.

        Args:
            result: Of the search.
            report: Folder of figures.
            run: The run's folder: ``allocation.json``, ``config.yaml``, and ``model/`` if it was exported.
            trial: Number of the winner's trial in the study.
        """
        self.tag({"trial": trial})
        self.client.log_artifacts(self._run, str(report))
        self.client.log_table(self._run, layer_table(result), "allocation_table.json")
        model = None if self.model == "none" else self._model(result, run)
        numbers = {key: value for key, value in result.row().items() if isinstance(value, int | float)}
        last = result.generations[-1].generation
        self.metrics({f"result/{key}": value for key, value in numbers.items()}, step=last, model=model)

    @property
    def link(self) -> str | None:
        """Where the UI shows this run's experiment; None before ``start``."""
        if self.run_id is None:
            return None
        base = self.uri if self.uri and self.uri.startswith("http") else UI
        experiment = self.client.get_run(self.run_id).info.experiment_id
        return f"{base.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}"

    def close(self, status: str, *, reason: str = "") -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; what was logged stays."""
        if self.run_id is None:
            return
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if reason:
            self.tag({"reason": reason})
        self.client.set_terminated(self.run_id, status=status)

    def summarize(self, multirun: str, *, status: str, files: Sequence[Path], note: str = "") -> None:
        """Close a multirun's parent run, with the comparison of its jobs; nothing if no job began."""
        parent = self._find(multirun)
        if parent is None:
            return
        for path in files:
            self.client.log_artifact(parent, str(path))
        if note:
            self.client.set_tag(parent, NOTE_TAG, note[:TAG_LENGTH])
        self.client.set_terminated(parent, status=status)

    @property
    def database(self) -> Path | None:
        """The SQLite file that runs are kept in; None for a server or another database."""
        uri = self.uri or resolved_uri()
        return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None

    @contextmanager
    def _first(self) -> Iterator[None]:
        """Keep other processes of this machine out: first use makes the database, the experiment, a parent run."""
        with FileLock(cache_folder("locks") / f"{digest(str(self.database or self.uri))}.lock", timeout=PATIENCE):
            yield

    def _given(self) -> str | None:
        """Return the run that the environment names, if any."""
        name = os.environ.get(RUN_ID)
        if not name:
            return None
        try:
            status = self.client.get_run(name).info.status
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

    def _parent(self, multirun: str) -> str:
        found = self._find(multirun)
        if found is not None:
            return found
        tags = {**resolve_tags(), MULTIRUN_TAG: multirun, "mlflow.source.name": "evosweep"}
        given = self._given()
        if given is not None:
            self.client.log_batch(given, tags=[RunTag(key, value) for key, value in tags.items()])
            return given
        made = self.client.create_run(self._experiment_id(), run_name=f"multirun {multirun}", tags=tags)
        return str(made.info.run_id)

    def _find(self, multirun: str) -> str | None:
        runs = self.client.search_runs(
            [self._experiment_id()], filter_string=f"tags.`{MULTIRUN_TAG}` = '{multirun}'", max_results=1
        )
        return runs[0].info.run_id if runs else None

    @property
    def _run(self) -> str:
        assert self.run_id is not None, "start() comes first"
        return self.run_id

    def _experiment_id(self) -> str:
        try:
            found = self.client.get_experiment_by_name(self.experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                raise EvosweepError(
                    f"the MLflow experiment {self.experiment!r} was deleted: choose another name=..., or type "
                    f"mlflow experiments restore --experiment-id {found.experiment_id}"
                )
            if found is None:
                return str(self.client.create_experiment(self.experiment, tags=experiment_tags()))
            for key, value in experiment_tags().items():
                if key not in found.tags:
                    self.client.set_experiment_tag(found.experiment_id, key, value)
            return str(found.experiment_id)
        except MlflowException as error:
            raise SettingError(
                "uri",
                owner=self,
                allowed="an MLflow tracking URI that answers",
                got=self.uri or resolved_uri(),
                hint=str(error).splitlines()[0],
            ) from error

    def _generation(self, record: GenerationRecord) -> None:
        values: dict[str, float] = {
            "val/kl": record.validation["kl"],
            "val/ppl": record.validation["ppl"],
            "tokens": record.tokens,
            "tokens_saved": record.tokens_saved,
            "tokens_per_second": record.tokens_per_second,
            "units_changed": record.changed,
            "seconds": record.seconds,
            "elapsed_seconds": record.elapsed,
            "bits": record.cost,
        }
        values["bits_per_weight"] = record.bits_per_weight
        values |= {f"sampler/{key}": value for key, value in record.facts.items()}
        for index, stage in enumerate(record.stages):
            for kind in ("best", "median", "worst"):
                values[f"stage_{index}/{kind}"] = getattr(stage, kind)
        self.metrics(values, step=record.generation)
        facts = {"generation": record.generation, "bits": record.cost, "validation": dict(record.validation)}
        self.client.log_dict(
            self._run,
            {**facts, "allocation": dict(record.elite)},
            f"generations/{record.generation:04d}/allocation.json",
        )
        if self.images and self._problem is not None and (record.changed or record.generation == 0):
            picture = level_image(self._problem, record.elite)
            self.client.log_image(self._run, picture, key="levels", step=record.generation, synchronous=True)

    def _model(self, result: SearchResult, run: Path) -> str:
        """Log the winner as a model of MLflow's: from which store, by which search, how to load it; return its id."""
        row, weights = result.row(), self.model == "weights" and (run / "model").is_dir()
        lineage = {key: self._facts.get(key) for key in ("store", "study", "evosweep")}
        known = {**lineage, **row, "problem": result.problem.fingerprint}
        made = self.client.create_logged_model(
            self._experiment_id(),
            name=f"{result.sampler}-s{result.seed}",
            source_run_id=self._run,
            model_type="evosweep",
            params={key: str(value) for key, value in known.items()},
            tags={"weights": str(weights).lower()},
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for each in ("allocation.json", "config.yaml"):
                shutil.copy(run / each, folder / each)
            code = result.export.get("load") if weights else None
            (folder / "README.md").write_text(f"{describe(result)}\n\n{loading(code)}\n", encoding="utf-8")
            if weights:
                self.client.log_model_artifacts(made.model_id, str(run / "model"))
            self.client.log_model_artifacts(made.model_id, name)
        self.client.finalize_logged_model(made.model_id, "READY")
        self.client.log_outputs(self._run, [LoggedModelOutput(made.model_id, step=result.generations[-1].generation)])
        return str(made.model_id)

    def _end(self, result: SearchResult) -> None:
        self.metrics({"dense/ppl": result.dense["ppl"], "size_mb": result.row()["size_mb"]})
        self.tag({NOTE_TAG: describe(result)})
        if result.export:
            self.tag({f"export.{key}": value for key, value in result.export.items()})
        with tempfile.TemporaryDirectory() as folder:
            result.allocation.save(Path(folder) / "allocation.json", **result.row())
            self.file(Path(folder) / "allocation.json")
            self.file(write_json(Path(folder) / "result.json", result.row()))


def resolved_uri() -> str:
    """Return the URI that MLflow itself would use here."""
    return str(mlflow.get_tracking_uri())


def _hint(error: BaseException) -> str:
    """Return what to do about a store that cannot be used."""
    if isinstance(error, CommandError) or "schema" in str(error):
        return "another program or another version of MLflow made it: mlflow db upgrade, or name a new file"
    if isinstance(error, MlflowException):
        return "MLflow keeps no runs in plain folders"
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def experiment_tags() -> dict[str, str]:
    """Return what makes the UI open an experiment with a table of its searches, best first, figures in columns."""
    columns = [*(f"params.`{key}`" for key in SHOWN_PARAMS), *(f"metrics.`{key}`" for key in SHOWN_METRICS)]
    view = {
        "selectedColumns": columns,
        "orderByKey": f"metrics.`{SHOWN_METRICS[0]}`",
        "orderByAsc": True,
        "searchFilter": "params.sampler != ''",  # a multirun's parent has none
    }
    return {KIND_TAG: "custom_model_development", VIEW_TAG: json.dumps(view)}
