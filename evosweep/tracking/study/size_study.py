"""An Optuna study of the sizes tried for a target: a trial a size, its excess over the target a constraint."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

SIZE = "bits_per_weight"
EXCESS = "excess"  # name of the constraint: nats per token over the target, feasible at 0 and below


class SizeStudy:
    """Records sizes as finished trials of a study that minimizes the size.

    Args:
        storage: Where the study is kept.
        name: Of the study; one that is there is gone on with, and sizes that it has are not added again.
        low: Least bits per weight.
        high: Most bits per weight.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, name: str, *, low: float, high: float) -> None:
        self.study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
        self.study.set_metric_names(["size_mb"])
        self._range = FloatDistribution(low, high)

    def add(self, step: Mapping[str, Any], *, excess: float) -> None:
        """Add a size, unless the study has it.

        Args:
            step: ``bits_per_weight``, ``size_mb``, and what else is known of it.
            excess: By how much its winner's loss is above the target.
        """
        if any(trial.user_attrs.get("folder") == step["folder"] for trial in self.study.get_trials(deepcopy=False)):
            return
        trial = create_trial(
            state=TrialState.COMPLETE,
            value=float(step["size_mb"]),
            params={SIZE: float(step[SIZE])},
            distributions={SIZE: self._range},
            user_attrs=dict(step),
            constraints={EXCESS: excess},
        )
        self.study.add_trial(trial)
