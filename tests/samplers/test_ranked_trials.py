"""The best trials, kept up to date trial by trial, are those that sorting all of them gives."""

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evosweep.samplers.ranked_trials import RankedTrials

SPACE = {name: CategoricalDistribution(("low", "high")) for name in "abc"}


def sorted_anew(trials: list[FrozenTrial], *, count: int, before: int, sign: float) -> list[int]:
    """Return the numbers of the best trials by sorting all of them."""
    fitting = [
        trial
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and trial.number < before
        and SPACE.keys() <= trial.params.keys()
        and all(value <= 0 for value in trial.constraints.values())
    ]
    best: dict[tuple, int] = {}
    for trial in sorted(fitting, key=lambda trial: (sign * trial.value, trial.number)):
        best.setdefault(tuple(trial.params[name] for name in SPACE), trial.number)
    return list(best.values())[:count]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_it_agrees_with_sorting_whenever_trials_finish(seed: int, direction: str) -> None:
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=seed))
    ranked = RankedTrials(SPACE, maximize=direction == "maximize")
    running: list[optuna.Trial] = []
    for step in range(150):
        trial = study.ask(SPACE if rng.random() < 0.95 else {})
        if rng.random() < 0.1:
            trial.set_constraint("budget", 1)
        running.append(trial)
        if step == 70:
            study.add_trial(create_trial(value=0.0, params=dict.fromkeys(SPACE, "low"), distributions=SPACE))
        while len(running) > 12:
            done = running.pop(int(rng.integers(len(running))))
            if rng.random() < 0.1:
                study.tell(done, state=TrialState.FAIL)
            else:
                study.tell(done, float(rng.integers(0, 6)))
        trials = study.get_trials(deepcopy=False)
        ranked.update(trials)
        for count, before in ((1, step + 1), (3, step // 2 + 1), (3, 1000)):
            found = [trial.number for trial in ranked.best(count, before=before)]
            assert found == sorted_anew(trials, count=count, before=before, sign=-1 if direction == "maximize" else 1)


def test_trials_are_read_once() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: sum(trial.suggest_categorical(name, ("low", "high")) == "low" for name in SPACE), 40)
    ranked = RankedTrials(SPACE, maximize=False)
    ranked.update(study.get_trials(deepcopy=False))
    assert ranked._settled == 40 and not ranked._read
    assert len(ranked._ranked) <= 8  # one entry an allocation: a repetition is never better than the first
