"""Writes a search into an Optuna study, a generation at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from io import BytesIO
from typing import Any

import numpy as np
import optuna
from optuna.artifacts import ArtifactMeta, FileSystemArtifactStore
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image

from evosweep.core.events import Candidate, Event, GenerationRecord, SearchEnded, SearchResult, SearchStarted
from evosweep.core.files import digest, json_safe
from evosweep.core.genomes import genome_to_text
from evosweep.core.problem import Genome, Problem
from evosweep.samplers import level_codes
from evosweep.samplers.base import unit_distributions
from evosweep.tracking.artifacts.heatmap import level_image, level_table
from evosweep.tracking.base import TrackingError
from evosweep.tracking.behind import one_line
from evosweep.tracking.palette import level_styles
from evosweep.tracking.study.dashboard import add_to_dashboard
from evosweep.tracking.study.storage import lighten

SPANS = 16  # most parameters over the depth of a model
RUN = "mlflow_run"  # attribute of the study and of elites
ELITE = "elite"  # attribute of trials that were the best of their generation
READABLE = "levels_by_layer"  # attribute of elites: a line a kind of layer, a short label a block
AGAIN = -1  # slot of a trial that records that a parent, which ran before, is the best again
Parameters = Callable[[Genome], dict[str, Any]]


class StudyRecorder:
    """Listener that adds each generation's candidates as finished trials.

    Every candidate is a pruned trial whose intermediate values are its stage scores. Those were taken on other tokens
    in every generation, so no two generations can be compared by them; a generation's elite also has its validation
    figures as attributes. Only the exported winner is a complete trial, added at the end, its value the validation KL:
    Optuna's best trial is therefore the one that was exported, although an earlier elite may have had a lower
    validation KL by chance (validation never selects), and no importance is computed from a handful of elites.

    All trials carry their levels as one string (``level_codes.allocation_of`` reads it) and what they changed in words;
    elites carry their levels in readable form, a line a kind of layer.

    Optuna Dashboard walks trials times parameter names at every poll, and sends every parameter's range with every
    trial; so by default elites have one parameter a kind of layer and at most ``SPANS`` over the depth, and
    the others none.

    Args:
        storage: Where the study is kept.
        name: Name of the study; one that is there is gone on with, and trials that it has are not added again.
        record: ``compact``, ``elites`` or ``all``, as in ``storage.Journal``.
        artifacts: Where elites' pictures are kept; none keeps none.
        light: Whether nobody reads the trials from this storage object, so that a journal need not keep in memory what
            its file holds of them.
    """

    def __init__(
        self,
        *,
        storage: optuna.storages.BaseStorage,
        name: str,
        record: str = "compact",
        artifacts: FileSystemArtifactStore | None = None,
        light: bool = False,
    ) -> None:
        try:
            self.study = optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            )
        except OSError as error:
            raise TrackingError(f"the study {name!r} cannot be written: {one_line(error)}") from error
        self.name = name
        self.record = record
        self.artifacts = artifacts
        self.light = light
        self.winner: int | None = None  # number of the last elite's trial; in the end, of the exported winner's
        self.missing = ""
        self._elites: dict[int, int] = {}  # generation to the number of its elite's trial
        self._run: dict[str, str] = {}
        self._problem: Problem | None = None
        self._parent: Genome | None = None
        known = self.study.get_trials(deepcopy=False)
        self._kept = [trial.number for trial in known if trial.state is not TrialState.COMPLETE]  # not yet met again
        self._exported = {trial.number: trial for trial in known if trial.state is TrialState.COMPLETE}
        self._next = self._first_new = len(known)  # numbers of trials that are added
        self._elite = 0  # number of the last elite's trial
        self._numbers: dict[bytes, int] = {}  # trial in which a genome ran first
        self._parameters: Parameters = lambda genome: {}
        self._distributions: dict[str, BaseDistribution] = {}

    def on_event(self, event: Event) -> None:
        """Write a start, a generation, or an end."""
        if isinstance(event, SearchStarted):
            self._start(event)
        elif isinstance(event, GenerationRecord):
            self._generation(event)
        elif isinstance(event, SearchEnded):
            self._end(event.result)

    @property
    def _known(self) -> Problem:
        assert self._problem is not None, "a search starts before its first generation"
        return self._problem

    def _start(self, event: SearchStarted) -> None:
        problem = self._problem = event.problem
        if event.facts.get(RUN) is not None:
            self._run = {RUN: event.facts[RUN]}
        facts = {
            **event.facts,
            **level_codes.key(problem),
            "seed": event.seed,
            "budget_bits": problem.budget,
            "problem": problem.fingerprint,
        }
        for key, value in facts.items():
            self.study.set_user_attr(key, value)
        self.study.set_metric_names(["kl"])
        if self.record == "compact":
            self._parameters, self._distributions = aggregates(problem)
        else:
            self._parameters = lambda genome: dict(problem.decode(genome))
            self._distributions = unit_distributions(problem)

    def _generation(self, record: GenerationRecord) -> None:
        elite = self._known.encode(record.elite)
        candidates = list(record.candidates)
        numbers: dict[int, int] = {}
        slot = record.elite_slot
        if slot is None and record.changed:  # one of several parents is the best now; it ran before
            slot = AGAIN
            numbers = {AGAIN: self._numbers[elite.tobytes()]}
            candidates.append(Candidate(slot=AGAIN, genome=elite, duplicate_of=AGAIN))
        own = self._numbers_for(len(candidates))
        for candidate, number in zip(candidates, own, strict=True):
            if candidate.slot == slot:
                self._elite = number
            if candidate.slot != AGAIN:
                numbers[candidate.slot] = number
                self._numbers.setdefault(candidate.genome.tobytes(), number)
        self.study.add_trials(
            [
                self._trial(candidate, record, numbers, won=candidate.slot == slot)
                for candidate, number in zip(candidates, own, strict=True)
                if number >= self._first_new
            ]
        )
        if self.light:
            lighten(self.study, (number for number in own if number >= self._first_new))
        self._elites[record.generation] = self.winner = self._elite
        self._parent = elite

    def _numbers_for(self, count: int) -> list[int]:
        """Return the numbers of the next trials: those that the study has already, then new ones."""
        kept = self._kept[:count]
        del self._kept[:count]
        new = range(self._next, self._next + count - len(kept))
        self._next = new.stop
        return [*kept, *new]

    def _end(self, result: SearchResult) -> None:
        """Add the exported winner as the only complete trial, and what the dashboard shows beside its plots."""
        problem = self._known
        record = result.generations[result.winner_generation]
        genome = problem.encode(result.allocation)
        attributes: dict[str, Any] = {
            "exported": True,
            "generation": record.generation,
            "bits_per_weight": problem.bits_per_weight(problem.cost(genome)),
            level_codes.LEVELS: genome_to_text(problem, genome),
            READABLE: readable(problem, genome),
            **{f"val_{key}": value for key, value in json_safe(dict(result.validation)).items()},
            **self._run,
        }
        if record.generation in self._elites:
            attributes["duplicate_of"] = self._elites[record.generation]
        trial = create_trial(
            state=TrialState.COMPLETE,
            value=float(result.validation["kl"]),
            params=self._parameters(genome),
            distributions=self._distributions,
            user_attrs=attributes,
            system_attrs=self._picture(record),
        )
        self.winner = self._exported_before(trial)
        if self.winner is None:
            self.study.add_trial(trial)
            self.winner = self._next
            self._next += 1
        self.study.set_user_attr("winner", dict(result.allocation))
        self.study.set_user_attr("result", json_safe(result.row()))
        self.study.set_user_attr("stopped", result.stopped)
        add_to_dashboard(self.study, result)

    def _exported_before(self, trial: FrozenTrial) -> int | None:
        """Return the number of a winner's trial that was added before the run was killed; None where there is none."""
        keys = ("generation", level_codes.LEVELS, RUN)

        def same(other: FrozenTrial) -> bool:
            return all(other.user_attrs.get(key) == trial.user_attrs.get(key) for key in keys)

        return next((number for number, other in self._exported.items() if same(other)), None)

    def _trial(
        self, candidate: Candidate, record: GenerationRecord, numbers: Mapping[int, int], *, won: bool
    ) -> FrozenTrial:
        problem = self._known
        attributes: dict[str, Any] = {
            "generation": record.generation,
            "slot": candidate.slot,
            "parent": candidate.parent,
            "bits_per_weight": problem.bits_per_weight(problem.cost(candidate.genome)),
            level_codes.LEVELS: genome_to_text(problem, candidate.genome),
        }
        if self._parent is not None:
            attributes["changed"] = self._changed(candidate.genome, self._parent)
        if candidate.duplicate_of is not None:
            attributes["duplicate_of"] = numbers[candidate.duplicate_of]
        if won:
            attributes |= {f"val_{key}": value for key, value in json_safe(dict(record.validation)).items()}
            attributes |= {ELITE: True, READABLE: readable(problem, candidate.genome), **self._run}
        full = won or self.record == "all"
        trial = create_trial(
            state=TrialState.PRUNED,
            params=self._parameters(candidate.genome) if full else {},
            distributions=self._distributions if full else {},
            intermediate_values={int(stage): float(score) for stage, score in candidate.scores.items()},
            user_attrs=attributes,
            system_attrs=self._picture(record) if won else {},
        )
        trial.datetime_start = datetime.now() - timedelta(seconds=record.seconds)
        return trial

    def _changed(self, genome: Genome, parent: Genome) -> str:
        """Return the levels in which a genome differs from its parent, in words."""
        moved = np.flatnonzero(genome != parent).tolist()
        units = [(self._known.units[index], int(parent[index]), int(genome[index])) for index in moved]
        return ", ".join(f"{unit.name}: {unit.levels[old].name} to {unit.levels[new].name}" for unit, old, new in units)

    def _picture(self, record: GenerationRecord) -> dict[str, str]:
        """Save the elite's levels as a picture; return the attributes that link it in Optuna.

        A trial that is added finished cannot be given artifacts afterwards, so this is what Optuna's own
        ``upload_artifact`` would have noted.
        """
        if self.artifacts is None:
            return {}
        data = BytesIO()
        Image.fromarray(level_image(self._known, record.elite)).save(data, format="png")
        name = digest([self.study.study_name, record.generation])
        try:
            self.artifacts.write(name, BytesIO(data.getvalue()))
        except OSError as error:
            self.artifacts = None
            self.missing = f"the study has no pictures from generation {record.generation} on: {one_line(error)}"
            return {}
        meta = ArtifactMeta(
            artifact_id=name, filename=f"levels_{record.generation:04d}.png", mimetype="image/png", encoding=None
        )
        return {f"artifacts:{name}": json.dumps(asdict(meta))}


def readable(problem: Problem, genome: Genome) -> dict[str, str]:
    """Return the labels of a genome's levels by kind of layer, in the order of the blocks: ``{"mlp.up": "3 2 4"}``."""
    names, rows, _ = level_table(problem, problem.decode(genome))
    styles = level_styles(problem)
    labels = [" ".join(styles[name].label if name else "." for name in line) for line in names]
    return dict(zip(rows, labels, strict=True))


def aggregates(problem: Problem) -> tuple[Parameters, dict[str, BaseDistribution]]:
    """Return what gives a genome's true bits per weight by depth and by kind of layer, and the range of each.

    Deep models have several neighbouring blocks to a parameter, so that the dashboard stays quick.
    """
    blocks, block_of = np.unique([unit.block for unit in problem.units], return_inverse=True)
    spans = np.array_split(blocks, min(len(blocks), SPANS))
    span_of = np.repeat(np.arange(len(spans)), [len(span) for span in spans])[block_of]
    kinds = list(dict.fromkeys(unit.kind for unit in problem.units))
    kind_of = np.array([kinds.index(unit.kind) for unit in problem.units])
    digits = len(str(blocks[-1]))
    ends = [dict.fromkeys(f"{block:0{digits}d}" for block in (span[0], span[-1])) for span in spans]
    names = [*(f"bits/block {'-'.join(end)}" for end in ends), *(f"bits/{kind}" for kind in kinds)]

    def of(genome: Genome) -> dict[str, Any]:
        values = [*problem.mean_bits(genome, span_of), *problem.mean_bits(genome, kind_of)]
        return dict(zip(names, map(float, values), strict=True))

    highest = of(problem.sizes - 1)
    return of, {name: FloatDistribution(0.0, max(high, 1.0)) for name, high in highest.items()}
