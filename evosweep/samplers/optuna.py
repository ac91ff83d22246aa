"""Optuna's own samplers on our problem: what they propose, decoded to the nearest allocation within the budget."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Candidate
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.samplers.base import PopulationSampler
from evosweep.search.moves import fill, repair

KINDS = ("tpe", "cmaes", "nsga2", "gp", "qmc", "random")


class OptunaSampler(PopulationSampler):
    """One of Optuna's samplers, over one integer a unit (its level's place in the ladder).

    It knows nothing of the budget, so its proposals are repaired: units are lowered at random until the budget holds,
    then raised while it allows. What it is told is the score of the repaired allocation; ``facts`` says how many
    proposals needed it. In a plain study its history is asked for and told again, trial by trial, when the study is
    resumed. Its scores are all on the same tokens, as it compares them across generations.

    Args:
        problem: Units, ladders, budget.
        kind: ``tpe``, ``cmaes``, ``nsga2``, ``gp``, ``qmc`` or ``random``.
        seed: Of the sampler underneath, and of the repairs.
        offspring: Proposals a generation.

    Raises:
        SettingError: Optuna has no such sampler here.
        EvosweepError: A library that the sampler needs is not installed.
    """

    same_tokens = True

    def __init__(self, problem: Problem, *, kind: str, seed: int = 0, offspring: int = 64) -> None:
        super().__init__(problem, seed=seed)
        self.name = check_choice("kind", kind, KINDS)
        self.offspring = check_int("offspring", offspring, low=1)
        self._space: dict[str, BaseDistribution] = {
            unit.name: IntDistribution(0, len(unit.levels) - 1) for unit in problem.units
        }
        self._inner: optuna.Study | None = None
        self._asked: dict[int, optuna.Trial] = {}  # not told yet, by slot or by number of the outer trial
        self._proposed = self._repaired = 0
        self._lock = threading.RLock()
        self._study("minimize")  # whatever is wrong with it is said now

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Ask for a generation; asking again before ``learn`` forgets the last one."""
        del parents
        study = self._study("minimize")
        with self._lock:
            for trial in self._asked.values():
                self._tell(trial, None)
            self._asked.clear()
            return [self._ask(study, slot, (generation, slot)) for slot in range(self.offspring)]

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Tell what the proposals of ``genomes`` scored in their first stage; those never scored have failed."""
        with self._lock:
            for each in candidates:
                trial = self._asked.pop(each.slot, None)
                if trial is not None:
                    value = each.scores[min(each.scores)] if each.scores else np.inf
                    self._tell(trial, [value] if np.isfinite(value) else None)

    def size(self, generation: int) -> int:
        """Return the trials of a generation."""
        del generation
        return self.offspring

    def facts(self) -> Mapping[str, float]:
        """Return the share of proposals that did not fit or did not spend the budget as they were."""
        return {"repaired": self._repaired / max(self._proposed, 1)}

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the sampler underneath, too."""
        super().after_trial(study, trial, state, values)
        with self._lock:
            asked = self._asked.pop(trial.number, None)
            if asked is not None:
                self._tell(asked, values if state == TrialState.COMPLETE else None)

    def _proposal(self, study: optuna.Study, trial: FrozenTrial) -> Genome:
        with self._lock:
            fresh = self._inner is None or not self._inner.trials
            maximizes = study.direction == optuna.study.StudyDirection.MAXIMIZE
            inner = self._study("maximize" if maximizes else "minimize")
            if fresh:
                self._replay(inner, study, before=trial.number)
            return self._ask(inner, trial.number, ("trial", trial.number))

    def _replay(self, inner: optuna.Study, study: optuna.Study, *, before: int) -> None:
        """Bring the sampler underneath to where it was when the study stopped."""
        for past in study.get_trials(deepcopy=False)[:before]:
            if not past.state.is_finished() or not self._distributions.keys() <= past.params.keys():
                continue
            self._ask(inner, past.number, ("trial", past.number))
            self._tell(self._asked.pop(past.number), past.values if past.state == TrialState.COMPLETE else None)

    def _ask(self, study: optuna.Study, key: int, place: tuple[int | str, ...]) -> Genome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental samplers
            trial = study.ask(fixed_distributions=self._space)
        self._asked[key] = trial
        proposed = np.array([trial.params[name] for name in self._space], dtype=np.int64)
        genome, rng = proposed.copy(), generator(self.seed, self.name, *place)
        repair(self.problem, genome, rng)
        fill(self.problem, genome, rng)
        self._proposed += 1
        self._repaired += int((genome != proposed).any())
        return genome

    def _tell(self, trial: optuna.Trial, values: Sequence[float] | None) -> None:
        if values is None:
            trial.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.study.tell(trial, list(values))

    def _study(self, direction: Literal["minimize", "maximize"]) -> optuna.Study:
        """Return the study underneath, in memory; made at first use."""
        if self._inner is None or (not self._inner.trials and self._inner.direction.name.lower() != direction):
            try:
                sampler = _make(self.name, self.seed % 2**32, self.offspring)
            except ImportError as error:
                raise EvosweepError(f"sampler={self.name} needs {error.name}: pip install {error.name}") from error
            self._inner = optuna.create_study(sampler=sampler, direction=direction)
        return self._inner


def _make(kind: str, seed: int, offspring: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental arguments
        if kind == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=offspring, constant_liar=True)
        if kind == "cmaes":
            import cmaes  # noqa: F401, PLC0415 - optional; Optuna itself would only notice at the second trial

            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=1, popsize=offspring, with_margin=True)
        if kind == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(offspring, 2))
        if kind == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=offspring, deterministic_objective=False)
        if kind == "qmc":
            return optuna.samplers.QMCSampler(seed=seed, scramble=True)
        return optuna.samplers.RandomSampler(seed=seed)
