"""Checks of a task that no single object can make: what its parts would do to each other."""

from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.search.survival import ScoreAll
from evosweep.task import Exporter, Storage, Task
from evosweep.tracking.base import Tracker
from evosweep.workbench import Workbench


def check_levels(bench: Workbench, sampler: PopulationSampler) -> None:
    """Raise SettingError where a sampler would have to choose among single levels."""
    chooses = sampler.limit is None or bool(sampler.columns)
    if chooses and all(len(unit.levels) == 1 for unit in bench.planned):
        if bench.ladders:
            raise SettingError(
                "",
                owner=bench.units,
                allowed="rules that leave some unit two levels or more",
                got={unit.name: unit.level_names[0] for unit in bench.planned[:1]},
            )
        raise SettingError(
            "",
            owner=bench.compressor,
            allowed=f"one that gives units two levels or more for sampler={sampler.name}",
            got=[level.name for level in bench.planned[0].levels],
        )


def check_limits(problem: Problem, sampler: PopulationSampler) -> None:
    """Raise SettingError where a sampler cannot hold the bounds of a problem beside its size."""
    if problem.limits and not sampler.holds_limits:
        names = " and ".join(f"budget.{limit.name}" for limit in problem.limits)
        raise SettingError(
            "sampler",
            allowed=f"one that holds {names}: uniform, ilp, random, evopress, trust_region, nsga2_evopress",
            got=sampler.name,
        )


def check_ranked(task: Task, sampler: PopulationSampler) -> None:
    """Raise SettingError where a plan drops candidates by their loss alone, and the sampler goes by their size, too."""
    for setting, dropping in (
        ("racing", None if isinstance(task.plan.survival, ScoreAll) else task.plan.survival),
        ("surrogate", task.plan.screening),
    ):
        if sampler.ranks and dropping is not None:
            raise SettingError(
                f"search.{setting}",
                allowed=f"null with sampler={sampler.name}, which compares sizes, too",
                got=dropping,
            )


def check_together(storage: Storage, tracker: Tracker, exporter: Exporter) -> None:
    """Raise SettingError where studies and runs would go to one file, or weights be logged that are not exported.

    Args:
        storage: Of studies.
        tracker: Of runs.
        exporter: Of winners.
    """
    path = getattr(storage, "path", None)
    if path is not None and tracker.database == path.absolute():
        raise SettingError(
            "storage.path", allowed="a file of its own", got=str(path), hint="that is MLflow's database (tracking.uri)"
        )
    if tracker.model == "weights" and not (exporter.enabled and getattr(exporter, "runs", True)):
        raise SettingError("tracking.model", allowed=["none"], got="weights", hint="no model is exported")
