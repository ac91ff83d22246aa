"""Opens an earlier run again, without a search: its settings, model, store and allocation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from evosweep.cli.check import OWN, check_config, choices
from evosweep.cli.compose import build
from evosweep.cli.folders import CLAIM
from evosweep.cli.job import bench_of, shared_progress
from evosweep.cli.registering import registered_name
from evosweep.core.allocation_text import load_genome
from evosweep.core.errors import EvosweepError, did_you_mean
from evosweep.core.files import remove_empty_folders
from evosweep.core.problem import Genome, Problem
from evosweep.core.results import RESULT, read_result, write_result
from evosweep.core.run_record import command_of
from evosweep.exporters.card import with_figures
from evosweep.finish.base import Finished, load_tuned, save_tuned
from evosweep.models.patch import replaced_parameters
from evosweep.pipeline import CONFIG
from evosweep.result_row import validated
from evosweep.tracking.allocation_file import ALLOCATION
from evosweep.workbench import Workbench


@dataclass(frozen=True)
class Earlier:
    """An earlier run, opened again to export, score or resolve it.

    Attributes:
        folder: Of the run.
        config: Its settings, with what was overridden now.
        bench: Its model, text and level store.
        problem: Its units and budget.
        genome: The allocation that it chose, shape (units,).
        tuned: Parameters that a finish changed, by name; empty where there was none.
    """

    folder: Path
    config: DictConfig
    bench: Workbench
    problem: Problem
    genome: Genome
    tuned: Mapping[str, torch.Tensor] = field(default_factory=dict)


WHOLE = ("name", "seed", "model", "sampler", "report")  # the settings of every version have these


def settings_of(folder: Path, overrides: Sequence[str], conf: Path) -> DictConfig:
    """Return a run's resolved settings, changed as typed: ``export=dense``, ``data.path=other.jsonl``.

    As with Hydra, files of groups are chosen first, wherever they stand among the overrides.

    Args:
        folder: Of the run.
        overrides: As typed.
        conf: Folder of the configuration's files.

    Raises:
        EvosweepError: The file is damaged, or an override names no choice or no setting.
    """
    try:
        config = OmegaConf.load(folder / CONFIG)
    except (YAMLError, UnicodeDecodeError) as error:
        raise EvosweepError(f"{folder / CONFIG} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig) or any(key not in config for key in WHOLE):
        raise EvosweepError(f"{folder / CONFIG} was cut short, or holds something else than the settings of a run")
    return changed(config, overrides, conf)


def changed(config: DictConfig, overrides: Sequence[str], conf: Path) -> DictConfig:
    """Return resolved settings, changed as typed, as ``settings_of`` does.

    Args:
        config: The settings; changed.
        overrides: As typed.
        conf: Folder of the configuration's files.

    Raises:
        EvosweepError: An override names no choice or no setting.
    """
    changes = [
        (parsed.get_key_element().lstrip("+"), parsed)
        for parsed in OverridesParser.create().parse_overrides(list(overrides))
    ]
    for key, parsed in sorted(changes, key=lambda change: not choices(conf, change[0])):
        value = parsed.value()
        if choices(conf, key):
            config[key] = _choice(key, str(value), conf, keep=config.get(key))
        elif not _has(config, key) and not parsed.is_add():
            known = list(_keys(OmegaConf.to_container(config), ""))
            raise EvosweepError(f"there is no setting {key!r}{did_you_mean(key, known)}")
        else:
            OmegaConf.update(config, key, value)
    check_config(config, conf)
    return config


def _has(config: DictConfig, key: str) -> bool:
    """Return whether a setting exists, be its value null or still to be given."""
    parent, _, name = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    return OmegaConf.select(config, key) is not None or (isinstance(section, DictConfig) and name in section.keys())  # noqa: SIM118 - `in` takes ??? for missing


def _choice(group: str, choice: str, conf: Path, *, keep: Any) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        made = compose("config", overrides=[f"{group}={choice}"])[group]
    section = OmegaConf.create(OmegaConf.to_container(made, resolve=False))
    if group == "export" and isinstance(keep, DictConfig):
        section.update({key: keep[key] for key in OWN["export"] if key in keep})
    assert isinstance(section, DictConfig)
    return section


def _keys(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            full = f"{path}.{key}" if path else str(key)
            yield full
            yield from _keys(item, full)


def reopen(folder: Path, config: DictConfig, *, allocation: Path | None = None) -> Earlier:
    """Return a run's allocation on its model and store; the store is found again, or built again if it was cleaned.

    Args:
        folder: Of the run.
        config: Its settings.
        allocation: File of another allocation of the same levels; None: the run's own.

    Raises:
        EvosweepError: The run's settings give another store than the one that it chose from.
    """
    shared_progress().begin(prefix="", log=folder / CLAIM, first="opened again")
    bench = bench_of(config)
    check_store(folder, bench)
    problem = bench.problem(build(config, "budget"))
    if allocation is not None:
        return Earlier(folder, config, bench, problem, load_genome(allocation, problem))
    genome = load_genome(folder / ALLOCATION, problem)
    return Earlier(folder, config, bench, problem, genome, load_tuned(folder))


def check_store(folder: Path, bench: Workbench) -> None:
    """Raise EvosweepError where a run's levels are not those that it chose from: an allocation is for them alone."""
    if not (folder / RESULT).is_file():
        return
    known = read_result(folder / RESULT).get("store")
    if known is not None and known != bench.store.key:
        raise EvosweepError(
            f"the run in {folder} chose from level store {known}, its settings now give {bench.store.key}: the model, "
            f"the calibration text or evosweep have changed since; run the first line of its {CONFIG} again"
        )


def exporter_of(run: Earlier) -> Any:
    """Return the exporter that a run's settings name, checked against its levels.

    Raises:
        EvosweepError: It is none, or cannot hold the levels, or what it writes cannot be registered.
    """
    exporter = build(run.config, "export", without=OWN["export"])
    if not exporter.enabled:
        raise EvosweepError("export must be one that writes a model: export=packed, export=dense ...")
    exporter.check(run.bench.compressor, run.bench.drop, run.bench.anatomy, run.bench.units)
    exporter.check_problem(run.problem, run.bench.anatomy, run.genome)
    registered_name(run.config, build(run.config, "tracking"), exporter)
    return exporter


def export_earlier(run: Earlier, *, target: Path, name: str = "") -> dict[str, Any]:
    """Export a run's allocation; record it in the run's ``result.json``, if there is one, and where it is tracked.

    Args:
        run: The run, with the settings of the export.
        target: Folder to write.
        name: Of the export, where the run has several; empty: it is the run's only one.
    """
    exporter = exporter_of(run)
    row = read_result(run.folder / RESULT) if (run.folder / RESULT).is_file() else {}
    finished = _finished(run, row)
    try:
        with replaced_parameters(run.bench.loaded.model, finished.tuned):
            facts: dict[str, Any] = exporter.export(
                run.genome,
                problem=run.problem,
                evaluator=run.bench.evaluator,
                loaded=run.bench.loaded,
                folder=target,
            )
    finally:
        remove_empty_folders(target, stop=run.folder)
    register = run.config.export.get("register")
    facts |= {"register": register} if register else {}
    if row:
        row.setdefault("uniform", validated(run.bench, run.problem, run.problem.uniform()))
        facts = with_figures(facts, row, command=command_of(run.folder / CONFIG))
        row = {**row, "export": facts, **({"finish": dict(finished.facts)} if finished.facts else {})}
        if name:
            row["exports"] = {**row.get("exports", {}), name: facts}
        write_result(run.folder, row)
        _track(run.config, row)
    return facts


def _finished(run: Earlier, row: Mapping[str, Any]) -> Finished:
    """Return what a run's finishing step found: earlier, or now where the run did not come to it."""
    if row.get("finish") or "finish" not in run.config:
        return Finished(run.tuned, row.get("finish", {}))
    step = build(run.config, "finish")
    step.check(run.bench.anatomy)
    done: Finished = step.run(
        run.genome,
        problem=run.problem,
        evaluator=run.bench.evaluator,
        seed=run.config.seed,
        progress=shared_progress(),
    )
    save_tuned(run.folder, done.tuned)
    return done


def _track(config: DictConfig, row: Mapping[str, Any]) -> None:
    """Add a run's export to what its tracker has of it; where that fails, say so: the export itself is complete."""
    if row.get("mlflow_run"):
        tracker = build(config, "tracking")
        tracker.exported(row["mlflow_run"], row)
        if tracker.missing:
            shared_progress().say(tracker.missing)
