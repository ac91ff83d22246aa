"""The only reader of the configuration: build the parts, call the steps in order, return the result."""

import json
import logging
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import optuna
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from evosweep import __version__, parallel
from evosweep.core.budget import Budget
from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.events import Progress, SearchResult
from evosweep.core.files import write_json
from evosweep.core.problem import Problem
from evosweep.core.unit import Unit
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.memory import plan_memory
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.scorer import StagedScorer
from evosweep.evaluate.sensitivity import MEASURES, measure
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.checkpoint import check_length
from evosweep.models.load import LoadedModel
from evosweep.multirun import JOB_CONFIG, MULTIRUN
from evosweep.samplers.base import PopulationSampler
from evosweep.samplers.record import StudyRecorder
from evosweep.samplers.storage import Journal, Memory
from evosweep.search.loop import end_search, run_search
from evosweep.search.plan import Plan
from evosweep.settings import build
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import StorePlan, plan_store
from evosweep.tracking.behind import Behind
from evosweep.tracking.console import RichProgress
from evosweep.tracking.report import Report

WORKBENCH_KEYS = ("model", "data", "tokens", "compressor", "drop", "store", "evaluate")
PLAN_KEYS = ("generations", "stages", "racing", "surrogate", "tokens", "patience", "final")
CHOICES = ("model", "data", "compressor", "drop", "sampler", "fitness", "search")  # told as params
logger = logging.getLogger(__name__)
NAME = re.compile(r"[\w.-]+")


@dataclass
class Workbench:
    """Model, text, store and evaluator: what the jobs of a multirun share."""

    config: DictConfig
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        with self.timed("model"):
            return build(self.config, "model").load(progress=self.progress)

    @cached_property
    def splits(self) -> dict[str, TokenSplit]:
        """Token windows by split."""
        windows, source = build(self.config, "tokens"), build(self.config, "data")
        tokenizer = self.loaded.tokenizer
        with self.timed("text"):
            return windows.split(source, tokenizer, progress=self.progress)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The dense model taken apart."""
        return Anatomy(self.loaded.model)

    @cached_property
    def plan(self) -> StorePlan:
        """Units, levels and costs before any level is made."""
        return plan_store(self.anatomy, build(self.config, "compressor"), build(self.config, "drop"))

    @property
    def planned(self) -> tuple[Unit, ...]:
        """Units and costs before any level is made."""
        return self.plan.units

    @property
    def fixed_bits(self) -> int:
        """Bits of what belongs to no unit."""
        return self.plan.fixed_bits

    @cached_property
    def store(self) -> LevelStore:
        """The level store, found or built."""
        builder: StoreBuilder = build(self.config, "store")
        plan, splits = self.plan, self.splits
        with self.timed("store"):
            return builder.open(plan, splits["calibration"], model_name=self.loaded.name, progress=self.progress)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores genomes of the store."""
        resources = build(self.config, "evaluate")
        return Evaluator(anatomy=self.anatomy, store=self.store, splits=self.splits, resources=resources)

    @cached_property
    def dense(self) -> dict[str, float]:
        """Validation figures of the dense model."""
        scorer = StagedScorer(self.evaluator, fitness=KL(), seed=0)
        with self.timed("dense"):
            return scorer.validate(None)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note how long a phase takes."""
        began = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - began
        logger.debug("%s: %.1f s", phase, self.seconds[phase])


@lru_cache(maxsize=1)
def workbench(config: str) -> Workbench:
    """Return the workbench of a configuration; jobs in one process share the last one."""
    return Workbench(OmegaConf.create(json.loads(config)), RichProgress())


def run(config: DictConfig) -> dict[str, Any]:
    """Run one search from configuration to exported winner.

    Returns:
        The figures of the result, as in ``result.json``.

    Raises:
        EvosweepError: Something in the configuration or its files cannot be used.
    """
    quiet_libraries(verbose=HydraConfig.get().verbose)
    parallel.join()
    bench = workbench(json.dumps({key: OmegaConf.to_container(config[key], resolve=True) for key in WORKBENCH_KEYS}))
    job = prepare(config, bench)
    if not parallel.is_leader():
        return {"store": bench.store.key}  # the first process searches
    command = shlex.join(["python", "-m", "evosweep", *HydraConfig.get().overrides.task])
    settings = f"# {command}\n{OmegaConf.to_yaml(config, resolve=True)}"
    job.tracker.start(
        job.name,
        params=_params(config, job),
        config=settings,
        multirun=os.environ.get(MULTIRUN),
        tags={"folder": str(job.folder), "overrides": " ".join(_overrides())},
        inputs=[
            job.tracker.dataset(
                name=f"{config.name} {split.name}",
                digest=split.hash,
                context=split.name,
                tokens=split.tokens,
                source=OmegaConf.to_yaml(config.data, resolve=True),
            )
            for split in bench.splits.values()
        ],
    )
    (job.folder / JOB_CONFIG).write_text(settings, encoding="utf-8")
    try:
        result = job.search()
        result = job.export(result)
        row = job.finish(result)
    except BaseException as error:
        with suppress(Exception):  # what broke is known already
            job.settle()
        killed = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if killed else f"{type(error).__name__}: {error}"
        job.tracker.close("KILLED" if killed else "FAILED", reason=reason)
        raise
    job.tracker.close("FINISHED")
    return row


@dataclass
class Job:
    """One search, its settings read and checked."""

    name: str
    config: DictConfig
    bench: Workbench
    plan: Plan
    seed: int
    budget: Budget
    make_sampler: Callable[..., PopulationSampler]
    fitness: Fitness
    exporter: Any
    tracker: Any
    storage: Journal | Memory
    report: Report
    columns: Sequence[str]
    folder: Path
    listeners: tuple[Behind, ...] = ()
    recorder: StudyRecorder | None = None

    def search(self) -> SearchResult:
        """Open the store, measure what the sampler needs, search."""
        units, spent = self._measured(self.bench.store.units)
        problem = self._problem(units)
        recorder = self.recorder = StudyRecorder(
            storage=self.storage.open(),
            name=f"{self.name} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3],
            record=self.storage.record,
            artifacts=self.storage.artifact_store(),
        )
        self.listeners = (Behind(recorder), Behind(self.tracker))
        return run_search(
            name=self.name,
            sampler=self.make_sampler(problem=problem, seed=self.seed),
            scorer=build(self.config, "scorer")(self.bench.evaluator, fitness=self.fitness, seed=self.seed),
            plan=self.plan,
            dense=self.bench.dense,
            listeners=self.listeners,
            facts={
                "study": recorder.study.study_name,
                "store": self.bench.store.key,
                "mlflow_run": self.tracker.run_id,
                "evosweep": __version__,
            },
            tokens_spent=spent,
            progress=self.bench.progress,
            state_path=self.folder / "state.json",
            identity={
                "store": self.bench.store.key,
                "text": self.bench.splits["search"].hash,
                "fitness": self.fitness.name,
            },
        )

    def export(self, result: SearchResult) -> SearchResult:
        """Write the winner as a model that loads elsewhere, if asked."""
        result.allocation.save(self.folder / "allocation.json", **result.row())
        if not self.exporter.enabled:
            return result
        with self.bench.timed("export"):
            facts = self.exporter.export(
                result.problem.encode(result.allocation),
                problem=result.problem,
                evaluator=self.bench.evaluator,
                loaded=self.bench.loaded,
                folder=self.folder / "model",
                progress=self.bench.progress,
            )
        return replace(result, export=facts)

    def finish(self, result: SearchResult) -> dict[str, Any]:
        """Tell the listeners, write ``result.json``, return its figures."""
        report = self.report.write(result, self.folder)
        end_search(result, self.listeners)
        self.settle()
        winner = None if self.recorder is None else self.recorder.winner
        self.tracker.deliver(result, report=report, run=self.folder, trial=winner)
        fixed = self.bench.store.fixed_bits
        width = 8 * self.bench.anatomy.dtype.itemsize
        dense_bits = width * int(result.problem.numels.sum())
        row = {
            "run": self.name,
            "overrides": _overrides(),
            "budget": str(self.budget),
            **result.row(),
            "dense_bits_per_weight": float(width),
            "dense_size_mb": (dense_bits + fixed) / 8e6,
            "mlflow_run": self.tracker.run_id,
            "mlflow_link": self.tracker.link,
            "export": dict(result.export),
            "history": result.history(),
            "phases": {name: round(seconds, 2) for name, seconds in self.bench.seconds.items()},
        }
        write_json(self.folder / "result.json", row)
        return row

    def settle(self) -> None:
        """Wait until the listeners have heard everything."""
        for listener in self.listeners:
            listener.wait()

    def _problem(self, units: tuple[Unit, ...]) -> Problem:
        return self.budget.problem(units, fixed_bits=self.bench.store.fixed_bits, planned=self.bench.planned)

    def _measured(self, units: tuple[Unit, ...]) -> tuple[tuple[Unit, ...], int]:
        """Return the units with the columns that must be measured on the model, and the tokens this took."""
        wanted = [column for column in self.columns if column in MEASURES]
        if not wanted:
            return units, 0
        tokens = self.config.evaluate.sensitivity_tokens
        problem = self._problem(units)
        with self.bench.timed("sensitivities"):
            measured = [
                measure(
                    column, self.bench.evaluator, problem, tokens=tokens, seed=self.seed, progress=self.bench.progress
                )
                for column in wanted
            ]
        for columns, _ in measured:
            units = tuple(replace(unit, columns={**unit.columns, **columns.get(unit.name, {})}) for unit in units)
        return units, sum(spent for _, spent in measured)


def prepare(config: DictConfig, bench: Workbench) -> Job:
    """Read and check every setting before anything is written or any long work begins.

    Raises:
        EvosweepError: A setting cannot be used.
    """
    seed = check_int("seed", config.seed)
    if not isinstance(config.name, str) or not NAME.fullmatch(config.name):
        raise SettingError("name", allowed="letters, digits, '.', '_' and '-'", got=config.name)
    search: Any = instantiate(config.search, _convert_="all")  # a strategy may be an object
    try:
        plan = Plan.of(**{key: search[key] for key in PLAN_KEYS})
    except SettingError as error:
        raise error.at("search") from error
    groups = ("budget", "sampler", "fitness", "export", "tracking", "report", "evaluate", "store", "storage")
    parts = {group: build(config, group) for group in groups}
    for place, stage in enumerate(plan.stages):
        bench.splits["search"].count(f"search.stages[{place}].tokens", stage.tokens)
    check_together(parts["storage"], parts["tracking"], parts["export"])
    if parts["export"].enabled:
        parts["export"].check(build(config, "compressor"), build(config, "drop"), bench.anatomy)
    problem = parts["budget"].problem(bench.planned, fixed_bits=bench.fixed_bits)
    longest = max(split.seq_len for split in bench.splits.values())
    note = check_length(bench.loaded.model, longest)
    if note:
        bench.progress.say(note)
    plan_memory(parts["evaluate"], bench.anatomy, bench.planned, seq_len=longest)
    sampler = parts["sampler"](problem=problem, seed=seed)
    if set(MEASURES) & set(sampler.columns):
        bench.splits["search"].count("evaluate.sensitivity_tokens", config.evaluate.sensitivity_tokens)
    return Job(
        name=f"{sampler.name} {parts['budget']} s{seed}",
        config=config,
        bench=bench,
        plan=plan,
        seed=seed,
        budget=parts["budget"],
        make_sampler=parts["sampler"],
        fitness=parts["fitness"],
        exporter=parts["export"],
        tracker=parts["tracking"],
        storage=parts["storage"],
        report=parts["report"],
        columns=sampler.columns,
        folder=Path(HydraConfig.get().runtime.output_dir),
    )


def check_together(storage: Journal | Memory, tracker: Any, exporter: Any) -> None:
    """Raise SettingError where studies and runs would go to one file, or weights be logged that nobody exports."""
    path = getattr(storage, "path", None)
    if path is not None and tracker.database == path.absolute():
        raise SettingError(
            "storage.path", allowed="a file of its own", got=str(path), hint="that is MLflow's database (tracking.uri)"
        )
    if tracker.model == "weights" and not exporter.enabled:
        raise SettingError("tracking.model", allowed=["recipe", "none"], got="weights", hint="nothing is exported")


def quiet_libraries(*, verbose: object = False) -> None:
    """Leave the terminal to us; with ``hydra.verbose``, to every logger that it names, or (true) to all of them."""
    if verbose:  # Hydra has set the levels
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s")
        return
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _overrides() -> list[str]:
    """Return what was overridden for this job, but for what its name says anyway."""
    said = ("experiment=", "sampler=", "seed=", "name=", "tracking", "storage", "export")
    task = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
    return [override for override in task if not override.startswith(said)]


def _params(config: DictConfig, job: Job) -> dict[str, Any]:
    """Return what was chosen in short, and the resolved configuration as dotted keys."""
    choices = HydraConfig.get().runtime.choices
    params: dict[str, Any] = {group: choices.get(group) for group in CHOICES} | {"budget": str(job.budget)}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))
        elif not path.endswith("._target_"):
            params[path] = value

    walk(OmegaConf.to_container(config, resolve=True), "")
    return params
