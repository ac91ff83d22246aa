"""A search written into an Optuna study, a generation at a time."""

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

from evosweep.core.events import Candidate, Event, GenerationRecord, SearchEnded, SearchStarted
from evosweep.core.files import digest
from evosweep.core.problem import Genome, Problem
from evosweep.samplers import levels
from evosweep.samplers.base import unit_distributions
from evosweep.tracking.study.dashboard import dress
from evosweep.tracking.artifacts.heatmap import level_image

SPANS = 16  # most parameters over the depth of a model
RUN = "mlflow_run"  # attribute of the study and of elites
AGAIN = -1  # slot of a trial that says that a parent, which ran before, is the best again
Parameters = Callable[[Genome], dict[str, Any]]


class StudyRecorder:
    """Listener that adds each generation's candidates as finished trials.

    A generation's elite is a complete trial, its value the fixed-validation KL; Optuna's plots are made of these. The
    others are pruned trials whose intermediate values are their stage scores. An elite that stays is not written
    again. All carry their levels as one string (``levels.allocation_of`` reads it) and, in words, what they changed.

    Optuna Dashboard walks trials times parameter names at every poll, and sends every parameter's range with every
    trial; so by default elites have one parameter a kind of layer and at most ``SPANS`` over the depth, and
    the others none.

    Args:
        storage: Where the study is kept.
        name: Name of the study.
        record: ``compact``, ``elites`` or ``all``, as in ``storage.Journal``.
        artifacts: Where elites' pictures are kept; none keeps none.
    """

    def __init__(
        self,
        *,
        storage: optuna.storages.BaseStorage,
        name: str,
        record: str = "compact",
        artifacts: FileSystemArtifactStore | None = None,
    ) -> None:
        self.study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        self.record, self.artifacts = record, artifacts
        self.winner: int | None = None  # number of the last elite's trial
        self._run: dict[str, str] = {}
        self._problem: Problem | None = None
        self._parent: Genome | None = None
        self._written = 0
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
            self.study.set_user_attr("winner", dict(event.result.allocation))
            self.study.set_user_attr("result", event.result.row())
            self.study.set_user_attr("stopped", event.result.stopped)
            dress(self.study, event.result)

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
            **levels.key(problem),
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
        candidates, numbers, slot = list(record.candidates), {}, record.elite_slot
        if slot is None and record.changed:  # one of several parents is the best now; it ran before
            slot, numbers = AGAIN, {AGAIN: self._numbers[elite.tobytes()]}
            candidates.append(Candidate(slot=AGAIN, genome=elite, duplicate_of=AGAIN))
        for place, each in enumerate(candidates):
            number = self._written + place
            if each.slot == slot:
                self.winner = number
            if each.slot != AGAIN:
                numbers[each.slot] = number
                self._numbers.setdefault(each.genome.tobytes(), number)
        self.study.add_trials([self._trial(each, record, numbers, won=each.slot == slot) for each in candidates])
        self._written += len(candidates)
        self._parent = elite

    def _trial(
        self, candidate: Candidate, record: GenerationRecord, numbers: Mapping[int, int], *, won: bool
    ) -> FrozenTrial:
        problem = self._known
        attributes: dict[str, Any] = {
            "generation": record.generation,
            "slot": candidate.slot,
            "parent": candidate.parent,
            "bits_per_weight": problem.bits_per_weight(problem.cost(candidate.genome)),
            levels.LEVELS: levels.written(problem, candidate.genome),
        }
        if self._parent is not None:
            attributes["changed"] = self._changed(candidate.genome, self._parent)
        if candidate.duplicate_of is not None:
            attributes["duplicate_of"] = numbers[candidate.duplicate_of]
        if won:
            attributes |= {f"val_{key}": value for key, value in record.validation.items()}
            attributes |= self._run
        full = won or self.record == "all"
        trial = create_trial(
            state=TrialState.COMPLETE if won else TrialState.PRUNED,
            value=record.validation["kl"] if won else None,
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
        units = [(self._known.units[place], int(parent[place]), int(genome[place])) for place in moved]
        return ", ".join(f"{unit.name}: {unit.levels[old].name} to {unit.levels[new].name}" for unit, old, new in units)

    def _picture(self, record: GenerationRecord) -> dict[str, str]:
        """Keep the elite's levels as a picture; return what says so to Optuna.

        A trial that is added finished cannot be given artifacts afterwards, so this is what Optuna's own
        ``upload_artifact`` would have noted.
        """
        if self.artifacts is None:
            return {}
        data = BytesIO()
        Image.fromarray(level_image(self._known, record.elite)).save(data, format="png")
        name = digest([self.study.study_name, record.generation])
        self.artifacts.write(name, BytesIO(data.getvalue()))
        meta = ArtifactMeta(
            artifact_id=name, filename=f"levels_{record.generation:04d}.png", mimetype="image/png", encoding=None
        )
        return {f"artifacts:{name}": json.dumps(asdict(meta))}


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
