"""One job of the command line: builds objects from the configuration and runs the pipeline."""

import json
import logging
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
import transformers
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evosweep import __version__, parallel
from evosweep.cli.check import OWN
from evosweep.cli.compose import build, sections
from evosweep.cli.folders import CLAIM, check_writable
from evosweep.cli.identity import RunIdentity, overrides_of
from evosweep.cli.launch import JOBS, MULTIRUN, VARIED
from evosweep.cli.names import check_name
from evosweep.cli.progress import JobProgress
from evosweep.cli.registering import registered_name
from evosweep.cli.resume import over
from evosweep.cli.signals import Ending
from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.redact import redact
from evosweep.core.results import RESULT, read_result
from evosweep.data.domains import Domains
from evosweep.pipeline import CONFIG, check
from evosweep.pipeline import run as run_pipeline
from evosweep.search.plan import Plan
from evosweep.search.sharing import Sharing
from evosweep.task import Notes, Task
from evosweep.task_checks import check_together
from evosweep.tracking.console import RichProgress
from evosweep.tracking.naming import run_params, varied_values
from evosweep.tracking.study.storage import Memory
from evosweep.workbench import Materials, Workbench, open_bench

WORKBENCH = ("model", "data", "tokens", "compressor", "transform", "drop", "units", "store", "evaluate")
PLAN = ("generations", "stages", "racing", "surrogate", "tokens", "patience", "final")
PARTS = ("budget", "sampler", "fitness", "scorer", "tracking", "report", "storage")
SEED_LIMIT = 2**63 - 1
EXPORT_JOBS = ("winner", "all")
logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def shared_progress() -> JobProgress:
    """Return the progress of this process's jobs."""
    return JobProgress(RichProgress())


@lru_cache(maxsize=1)
def _opened(settings: str) -> Workbench:
    others = parallel.asked("prepare", {"settings": settings}) if parallel.leads() else nullcontext()
    with others:
        return open_bench(materials_of(OmegaConf.create(json.loads(settings))), progress=shared_progress())


def forget_bench() -> None:
    """Let the next job load its model anew."""
    _opened.cache_clear()


def bench_of(config: DictConfig) -> Workbench:
    """Return the workbench of a configuration; jobs of one process with the same settings share the last one."""
    groups = [*WORKBENCH, *(["objective"] if "objective" in config else [])]  # runs of earlier versions have none
    bench = _opened(json.dumps({key: sections(config, key)[1] for key in groups}))
    if parallel.leads():
        parallel.ask("fitness", {"fitness": sections(config, "fitness")[1]})
    return bench


def materials_of(config: DictConfig) -> Materials:
    """Return the objects that a workbench is made of."""
    made = {group: build(config, group, without=OWN.get(group, ())) for group in WORKBENCH}
    made["resources"] = made.pop("evaluate")
    made["domains"] = domains_of(config)
    if "objective" in config:
        made["objective"] = build(config, "objective")
    return Materials(**made)


def domains_of(config: DictConfig) -> Domains:
    """Return the texts of ``data.validation``; its errors name that setting."""
    _, data = sections(config, "data")
    section = {"_target_": "evosweep.data.domains.Domains", "sources": data.get("validation")}
    try:
        return build(OmegaConf.create({"data": {"validation": section}}), "data.validation")
    except SettingError as error:
        raise error.renamed(error.setting.replace("data.validation.sources", "data.validation", 1), "") from error


def run(config: DictConfig) -> dict[str, Any]:
    """Run one search from configuration to exported winner.

    Returns:
        The flat row of ``result.json``.

    Raises:
        EvosweepError: Something in the configuration or its files cannot be used.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    varied = varied_values(list(hydra.overrides.task), json.loads(os.environ.get(VARIED, "[]")))
    resumes = config.get("resume") is not None and (folder / CONFIG).is_file()
    if resumes and over(folder, config):
        return read_result(folder / RESULT)  # a job of a multirun that goes on
    task = replace(task_of(config, folder=folder, resume=resumes), varied=varied)
    shared_progress().begin(prefix=prefix_of_job(), log=folder / CLAIM, first=command_text(list(hydra.overrides.task)))
    bench = bench_of(config)
    draft = check(task, bench)
    overrides = list(hydra.overrides.task)
    notes = notes_of(config, task, model=bench.loaded.name, overrides=overrides, choices=hydra.runtime.choices)
    return run_pipeline(task, bench, draft, notes)


def task_of(config: DictConfig, *, folder: Path, resume: bool = False) -> Task:
    """Return the task that a configuration describes; every setting that needs no model is checked.

    Args:
        config: The whole configuration.
        folder: Of the run.
        resume: Whether the search goes on from the state in ``folder``.

    Raises:
        SettingError: A setting cannot be used.
    """
    seed = check_int("seed", config.seed, low=-SEED_LIMIT, high=SEED_LIMIT)
    check_name(config.name)
    made = {group: build(config, group) for group in PARTS}
    if "finish" in config:  # runs of earlier versions have none
        made["finish"] = build(config, "finish")
    if "tasks" in config:
        made["tasks"] = build(config, "tasks")
    if "workers" in config:
        made["sharing"] = build(config, "workers")
    exporter = build(config, "export", without=OWN["export"])
    jobs = config.export.get("jobs", "winner")
    if jobs not in EXPORT_JOBS:
        raise SettingError("export.jobs", allowed=EXPORT_JOBS, got=jobs)
    check_together(made["storage"], made["tracking"], exporter)
    check_storage(made["storage"])
    check_shared(made["storage"], made.get("sharing", Sharing()))
    return Task(
        seed=seed,
        plan=plan_of(config),
        exporter=exporter,
        register=registered_name(config, made["tracking"], exporter),
        tracker=made.pop("tracking"),
        folder=folder,
        export_now=MULTIRUN not in os.environ or jobs == "all" or config.tracking.get("model") == "weights",
        resume=resume,
        guard=Ending.held,
        **made,
    )


def plan_of(config: DictConfig) -> Plan:
    """Return the plan of the search; its errors name the settings of ``search``."""
    _, search = sections(config, "search")
    stages = search.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise SettingError(
            "search.stages",
            allowed="a list of {survivors: .., tokens: ..}",
            got=stages,
            hint="in a shell, quoted: 'search.stages=[{survivors: 1, tokens: 256}]'",
        )
    try:
        return Plan.of(**{key: search[key] for key in PLAN if key in search})
    except SettingError as error:
        raise error.at("search") from error


def check_storage(storage: Any) -> None:
    """Raise SettingError where studies or their pictures could not be written."""
    path = getattr(storage, "path", None)
    artifacts = getattr(storage, "artifacts", None)
    if path is not None:
        check_writable(Path(path), setting="storage.path", file=True)
    if artifacts is not None:
        if not isinstance(artifacts, str) or not artifacts:
            raise SettingError("storage.artifacts", allowed="a folder, or null", got=artifacts)
        check_writable(Path(artifacts), setting="storage.artifacts")


def check_shared(storage: Any, sharing: Sharing) -> None:
    """Raise SettingError where workers could not reach the storage of a search that is shared."""
    if sharing.parts is not None and isinstance(storage, Memory):
        raise SettingError(
            "storage",
            allowed="one that other processes reach, as workers.parts is set: journal, database or grpc",
            got="memory",
        )


def prefix_of_job() -> str:
    number = HydraConfig.get().job.num if MULTIRUN in os.environ else None
    return "" if number is None else f"[job {int(number) + 1}/{os.environ.get(JOBS, '?')}] "


def command_text(overrides: Sequence[str]) -> str:
    """Return the command that starts a job with these overrides, without credentials."""
    return shlex.join(["python", "-m", "evosweep", *redact(list(overrides))])


def settings_text(config: DictConfig, overrides: Sequence[str]) -> str:
    """Return the text of a run's ``config.yaml``: its command, and its settings without credentials."""
    return f"# {command_text(overrides)}\n{redact(OmegaConf.to_yaml(config, resolve=True))}"


def notes_of(
    config: DictConfig, task: Task, *, model: str, overrides: Sequence[str], choices: Mapping[str, Any]
) -> Notes:
    """Return the notes that are recorded about a run.

    Args:
        config: Its configuration.
        task: Made of it.
        model: Name of the model.
        overrides: As typed.
        choices: Chosen file of every group.
    """
    shown = overrides_of(list(overrides))
    return Notes(
        row={
            "overrides": shown,
            "identity": str(RunIdentity.of(config)),
            "name": config.name,
            "calibration_seed": config.tokens.get("seed", 0),
        },
        params=run_params(choices=choices, model=model, budget=str(task.budget), seed=task.seed, varied=task.varied),
        config=settings_text(config, overrides),
        source=redact(OmegaConf.to_yaml(config.data, resolve=True)),
        experiment=config.name,
        multirun=os.environ.get(MULTIRUN),
        tags={"overrides": " ".join(shown)},
        facts={"evosweep": __version__},
    )


def quiet_libraries(*, verbose: object = False) -> None:
    """Silence the libraries' logs and warnings; ``hydra.verbose`` keeps those that it names, or (true) all."""
    if verbose:  # Hydra has set the levels
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s")
        return
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("mlflow", "alembic", "httpx", "huggingface_hub", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A traceback for every failure of its database, which it raises, too: the tracker says in one line what is missing.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
