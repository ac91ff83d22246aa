"""A search written into an Optuna study, a generation at a time."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evosweep.core.events import Candidate, Event, GenerationRecord, SearchEnded, SearchStarted
from evosweep.core.problem import Problem


class StudyRecorder:
    """Listener that adds each generation's candidates as finished trials.

    A generation's elite is a complete trial whose value is the fixed-validation KL; the others are pruned trials
    whose intermediate values are their stage scores. An elite that stays is not written again.

    Args:
        storage: Where the study is kept.
        name: Name of the study.
    """

    def __init__(self, *, storage: optuna.storages.BaseStorage, name: str) -> None:
        self.study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        self._problem: Problem | None = None

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
            self.study.add_trials([self._trial(candidate, event) for candidate in event.candidates])
        elif isinstance(event, SearchEnded):
            self.study.set_user_attr("winner", dict(event.result.allocation))
            self.study.set_user_attr("result", _plain(event.result.row()))
            self.study.set_user_attr("stopped", event.result.stopped)

    def _trial(self, candidate: Candidate, record: GenerationRecord) -> FrozenTrial:
        assert self._problem is not None, "a search starts before its first generation"
        won = candidate.slot == record.elite_slot
        trial = create_trial(
            state=TrialState.COMPLETE if won else TrialState.PRUNED,
            value=record.validation["kl"] if won else None,
            params=dict(self._problem.decode(candidate.genome)),
            distributions={unit.name: CategoricalDistribution(unit.level_names) for unit in self._problem.units},
            intermediate_values={int(stage): float(score) for stage, score in candidate.scores.items()},
            user_attrs={"bits_per_weight": self._problem.bits_per_weight(self._problem.cost(candidate.genome))}
            | ({f"val_{key}": value for key, value in record.validation.items()} if won else {}),
            system_attrs={"evosweep:generation": record.generation, "evosweep:slot": candidate.slot,
                          "evosweep:parent": candidate.parent},
        )
        trial.datetime_start = datetime.now() - timedelta(seconds=record.seconds)
        return trial


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if isinstance(value, str | int | float | bool)}
