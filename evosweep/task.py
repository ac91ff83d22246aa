"""The objects that a search is made of, and what is recorded beside its figures."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evosweep.compressors.base import Compressor
from evosweep.core.budget import Budget
from evosweep.core.events import Progress
from evosweep.core.problem import Genome, Problem
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.scorer import StagedScorer
from evosweep.evaluate.tasks.tasks import Tasks
from evosweep.finish.base import Finished, NoFinish
from evosweep.fitness.base import Fitness
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.samplers.base import PopulationSampler
from evosweep.search.plan import Plan
from evosweep.search.protocols import Scorer
from evosweep.search.sharing import Sharing
from evosweep.store.units import Units
from evosweep.tracking.base import Tracker
from evosweep.tracking.report import Report


class Exporter(Protocol):
    """Writes a winner as a model that loads elsewhere."""

    @property
    def enabled(self) -> bool:
        """Whether to export at all."""

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where what a search may choose cannot be written.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """

    def check_problem(self, problem: Problem, anatomy: Anatomy, genome: Any = None) -> None:
        """Raise SettingError where some allocation of the problem cannot be written.

        Args:
            problem: As it will be searched.
            anatomy: The model.
            genome: The one allocation that is asked about, after a search; None: any.
        """

    def export(
        self,
        genome: Any,
        *,
        problem: Problem,
        evaluator: Evaluator,
        loaded: LoadedModel,
        folder: Path,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Write the model; return ``path``, ``bytes``, ``size_mb``, ``load``, ``how_to_load`` ...

        Args:
            genome: Level of every unit.
            problem: Units and their levels.
            evaluator: Has the model and the levels.
            loaded: The dense model with its tokenizer.
            folder: Where to write.
            progress: Shows how large the export will be.
        """


class Finish(Protocol):
    """Learns what belongs to no unit, for the winner only, before it is exported."""

    def check(self, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where a model cannot be finished so."""

    def run(self, genome: Any, *, problem: Problem, evaluator: Evaluator, seed: int, progress: Progress) -> Finished:
        """Return new values of parameters, and the figures of before and after.

        Args:
            genome: Level of every unit.
            problem: Units and their levels.
            evaluator: Has the model and the levels.
            seed: Of all randomness.
            progress: Shows how far it is.
        """


class Storage(Protocol):
    """Keeps Optuna studies."""

    record: str
    repaired: str

    def open(self) -> Any:
        """Return Optuna's storage."""

    def artifact_store(self) -> Any:
        """Return where pictures are kept, if anywhere."""


@dataclass(frozen=True)
class Task:
    """The objects of one search, and where its result is written.

    Attributes:
        sampler: Makes the sampler of a problem: ``sampler(problem=.., seed=..)``.
        scorer: Makes what scores candidates: ``scorer(evaluator=.., fitness=.., seed=..)``.
        tasks: Questions that dense model, uniform allocation and winner are asked.
        resume: Whether the search goes on from the state in ``folder``.
        guard: Makes the context in which a generation is scored and written, as in ``run_search``.
        sharing: Whether other processes may score parts of the search.
        varied: Settings that a multirun varies, with this run's values; part of the run's name.
        register: Name under which the exported winner is registered as a model; None: it is not.
        export_now: Whether the winner is exported by this run; a multirun exports its own winner at the end.
        columns: What was measured of units before, by the unit's name; None: the run measures what its sampler needs.
        more_starts: Returns further starts of the search, given its sampler.
    """

    seed: int
    budget: Budget
    sampler: Callable[..., PopulationSampler]
    fitness: Fitness
    plan: Plan
    exporter: Exporter
    tracker: Tracker
    storage: Storage
    report: Report
    folder: Path
    scorer: Callable[..., Scorer] = StagedScorer
    finish: Finish = field(default_factory=NoFinish)
    tasks: Tasks = field(default_factory=Tasks)
    varied: Mapping[str, str] = field(default_factory=dict)
    export_now: bool = True
    register: str | None = None
    resume: bool = False
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext
    sharing: Sharing = field(default_factory=Sharing)
    columns: Mapping[str, Mapping[str, float]] | None = None
    more_starts: Callable[[PopulationSampler], Sequence[Genome]] | None = None


@dataclass(frozen=True)
class Notes:
    """What is recorded about a run beside its figures.

    Attributes:
        row: Further entries of ``result.json``.
        params: Of the tracker's run.
        config: Text of ``config.yaml``.
        source: The text's settings, for the tracker.
        experiment: Name that token splits are recorded under.
        multirun: Name of the multirun that the run belongs to.
        tags: Of the tracker's run.
        facts: Of the study and the tracker's run.
    """

    row: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    source: str = ""
    experiment: str = "evosweep"
    multirun: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """What checking a task against its model and text gives, before any long work.

    Attributes:
        name: Of the run.
        columns: Names of what the sampler needs measured of every unit.
    """

    name: str
    columns: tuple[str, ...]
