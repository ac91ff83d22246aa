"""A search written into an Optuna study, a generation at a time."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from evosweep.core.events import Candidate, Event, GenerationRecord, SearchEnded, SearchStarted
from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import unit_distributions
from evosweep.tracking.describe import describe


class StudyRecorder:
    """Listener that adds each generation's candidates as finished trials.

    A generation's elite is a complete trial with one parameter a unit, its value the fixed-validation KL; Optuna's
    plots are made of these. The others are pruned trials whose intermediate values are their stage scores; of their
    levels only what differs from the parent is kept (user attribute ``changed``), or a search of some thousand
    candidates would fill hundreds of megabytes. An elite that stays is not written again.

    Args:
        storage: Where the study is kept.
        name: Name of the study.
    """

    def __init__(self, *, storage: optuna.storages.BaseStorage, name: str) -> None:
        self.study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        self._problem: Problem | None = None
        self._parent: Genome | None = None
        self._written = 0

    def on_event(self, event: Event) -> None:
        """Write a start, a generation, or an end."""
        if isinstance(event, SearchStarted):
            self._problem = event.problem
            facts = {**event.facts, "seed": event.seed, "budget_bits": event.problem.budget,
                     "problem": event.problem.fingerprint}
            for key, value in facts.items():
                self.study.set_user_attr(key, value)
            self.study.set_metric_names(["val_kl"])
        elif isinstance(event, GenerationRecord):
            numbers = {each.slot: self._written + place for place, each in enumerate(event.candidates)}
            self.study.add_trials([self._trial(candidate, event, numbers) for candidate in event.candidates])
            self._written += len(event.candidates)
            assert self._problem is not None, "a search starts before its first generation"
            self._parent = self._problem.encode(event.elite)
        elif isinstance(event, SearchEnded):
            self.study.set_user_attr("winner", dict(event.result.allocation))
            self.study.set_user_attr("result", event.result.row())
            self.study.set_user_attr("stopped", event.result.stopped)
            with suppress(ImportError):  # an extra; without it nobody reads notes
                from optuna_dashboard import save_note  # noqa: PLC0415

                save_note(self.study, describe(event.result))

    def _trial(self, candidate: Candidate, record: GenerationRecord, numbers: Mapping[int, int]) -> FrozenTrial:
        assert self._problem is not None, "a search starts before its first generation"
        problem, won = self._problem, candidate.slot == record.elite_slot
        attributes: dict[str, Any] = {
            "generation": record.generation,
            "slot": candidate.slot,
            "parent": candidate.parent,
            "bits_per_weight": problem.bits_per_weight(problem.cost(candidate.genome)),
        }
        if candidate.duplicate_of is not None:
            attributes["duplicate_of"] = numbers[candidate.duplicate_of]
        if won:
            attributes |= {f"val_{key}": value for key, value in record.validation.items()}
        else:
            attributes["changed"] = self._changed(candidate.genome)
        trial = create_trial(
            state=TrialState.COMPLETE if won else TrialState.PRUNED,
            value=record.validation["kl"] if won else None,
            params=dict(problem.decode(candidate.genome)) if won else {},
            distributions=unit_distributions(problem) if won else {},
            intermediate_values={int(stage): float(score) for stage, score in candidate.scores.items()},
            user_attrs=attributes,
        )
        trial.datetime_start = datetime.now() - timedelta(seconds=record.seconds)
        return trial

    def _changed(self, genome: Genome) -> dict[str, str]:
        """Return the levels in which a genome differs from its parent; all of them where it has none."""
        assert self._problem is not None, "a search starts before its first generation"
        places = range(len(genome)) if self._parent is None else np.flatnonzero(genome != self._parent).tolist()
        units = self._problem.units
        return {units[place].name: units[place].levels[int(genome[place])].name for place in places}
