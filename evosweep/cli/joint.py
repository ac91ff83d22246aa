"""One job of the command line that is several searches: a list of budgets, or a quality that the smallest is found for.

Each search has a folder of its own below the run's, with its settings as if it had been run alone.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from evosweep.budget_list import Job, check_budgets, run_budgets
from evosweep.cli import job
from evosweep.cli.compose import build, imply_budget
from evosweep.cli.folders import CLAIM
from evosweep.cli.launch import MULTIRUN, VARIED
from evosweep.cli.resume import over
from evosweep.core.budget import KINDS, Budget
from evosweep.core.errors import SettingError
from evosweep.core.files import write_json, write_text
from evosweep.core.results import RESULT, read_result
from evosweep.core.run_record import SEVERAL, RunRecord, several_of
from evosweep.core.target import Target
from evosweep.pipeline import CONFIG, check
from evosweep.quality_target import TargetSearch
from evosweep.tracking.naming import varied_values
from evosweep.tracking.study.size_study import SizeStudy
from evosweep.workbench import Workbench


def run(config: DictConfig) -> dict[str, Any]:
    """Run what a configuration describes: one search, or several; return the row of the first or of the one wanted.

    Raises:
        EvosweepError: Something in the configuration or its files cannot be used.
    """
    hydra = HydraConfig.get()
    job.quiet_libraries(verbose=hydra.verbose)
    typed = list(hydra.overrides.task)
    target = build(config, "target") if config.get("target") is not None else Target()
    if target:
        given = [text for text in typed if text.startswith("budget.") and not text.endswith("=null")]
        if given:
            raise SettingError("target", allowed="given without a budget, which it finds", got=given[0])
        return _Joint(config, typed).run_target(target)
    imply_budget(config, typed)
    kind = listed(config)
    return job.run(config) if kind is None else _Joint(config, typed).run_list(kind)


def listed(config: DictConfig) -> str | None:
    """Return the kind of budget that is a list; None where it is a single one."""
    found = [kind for kind in KINDS if isinstance(config.budget.get(kind), ListConfig)]
    return found[0] if found else None


class _Joint:
    """Several searches of one configuration.

    Args:
        config: The whole configuration.
        typed: Overrides of the command.
    """

    def __init__(self, config: DictConfig, typed: Sequence[str]) -> None:
        self.config = config
        self.typed = typed
        self.folder = Path(HydraConfig.get().runtime.output_dir)
        self.resumes = config.get("resume") is not None
        self.multirun = str(
            os.environ.get(MULTIRUN)
            or several_of(self.folder).get("multirun")
            or f"{config.name} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3]
        )

    def run_list(self, kind: str) -> dict[str, Any]:
        """Run the searches of a list of budgets; return the row of the first of them."""
        values = list(self.config.budget[kind])
        if len(values) < 2 or len(set(map(str, values))) < len(values):
            several = "one budget, or a list of two or more different ones"
            raise SettingError(f"budget.{kind}", allowed=several, got=values)
        names = [f"{kind}_{value}" for value in values]
        if self.resumes and over(self.folder, self.config):
            return read_result(self.folder / names[0] / RESULT)
        budgets = [build(self._config(kind, value), "budget") for value in values]
        bench = self._bench()
        check_budgets(budgets, bench)
        jobs = [self._job(kind, value, bench) for value in values]
        self._begin(names)
        rows = run_budgets(jobs, bench, share=budgets[0].others)
        RunRecord(finished=True).write(self.folder)
        return rows[0]

    def run_target(self, target: Target) -> dict[str, Any]:
        """Run the searches for the smallest size that holds a target; return the row of that size."""
        known = several_of(self.folder)
        if self.resumes and known.get("winner") and over(self.folder, self.config):
            return read_result(self.folder / known["winner"] / RESULT)
        bench = self._bench()
        whole = bench.planned_problem(Budget(bits_per_weight=1e12))
        middle = round(whole.bits_per_weight((whole.least + whole.most) // 2), 4)
        first = self._job("bits_per_weight", middle, bench)
        search = TargetSearch(
            make=lambda budget: self._job("bits_per_weight", budget.value, bench),
            probe=first,
            bench=bench,
            target=target,
            folder=self.folder,
        )
        search.check_reach()
        self._begin([])
        search.study = SizeStudy(
            first.task.storage.open(),
            f"{self.multirun}: {target}",
            low=whole.bits_per_weight(whole.least),
            high=whole.bits_per_weight(whole.most) + 1e-4,
        )
        winner, row = search.run()
        names = [made.task.folder.name for made in search.jobs.values()]
        self._begin(names, winner=winner.task.folder.name)
        RunRecord(finished=True).write(self.folder)
        return row

    def _bench(self) -> Workbench:
        job.shared_progress().begin(
            prefix=job.prefix_of_job(), log=self.folder / CLAIM, first=job.command_text(self.typed)
        )
        return job.bench_of(self.config)

    def _job(self, kind: str, value: Any, bench: Workbench) -> Job:
        """Return the job of a budget, checked."""
        config = self._config(kind, value)
        folder = self.folder / f"{kind}_{value}"
        resumes = self.resumes and (folder / CONFIG).is_file()
        varied = varied_values(self.typed, json.loads(os.environ.get(VARIED, "[]")))
        task = replace(job.task_of(config, folder=folder, resume=resumes), varied=varied)
        draft = check(task, bench)
        own = [text for text in self.typed if not text.lstrip("+").startswith((f"budget.{kind}=", "target."))]
        overrides = [*own, f"budget.{kind}={value}"]
        choices = HydraConfig.get().runtime.choices
        notes = job.notes_of(config, task, model=bench.loaded.name, overrides=overrides, choices=choices)
        return Job(task, draft, replace(notes, multirun=self.multirun))

    def _config(self, kind: str, value: Any) -> DictConfig:
        """Return the configuration of a budget."""
        keys = [str(key) for key in self.config if key not in ("budget", "target", "hydra")]
        changed = OmegaConf.masked_copy(self.config, keys)
        section = OmegaConf.to_container(self.config.budget)
        assert isinstance(section, dict)
        with open_dict(changed):
            changed.budget = {**section, **dict.fromkeys(KINDS), kind: value}
        return changed

    def _begin(self, names: Sequence[str], *, winner: str | None = None) -> None:
        """Write what a later command needs to go on: settings, the searches' folders, the name that joins them.

        Args:
            names: Of the folders.
            winner: The folder of the one that was wanted, where one is.
        """
        write_text(self.folder / CONFIG, job.settings_text(self.config, self.typed))
        write_json(self.folder / SEVERAL, {"budgets": list(names), "multirun": self.multirun, "winner": winner})
        RunRecord().write(self.folder)
