"""Optuna's own samplers on our problem: their proposals, repaired to the budget."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Candidate
from evosweep.core.files import digest
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.samplers.base import PopulationSampler
from evosweep.search.moves import fill, repair

KINDS = ("tpe", "cmaes", "nsga2", "gp", "qmc", "random")
Direction = Literal["minimize", "maximize"]
CMA_POINT = "x_for_tell"  # attribute with the point that Optuna's CMA-ES learns from


class RepairedSampler(optuna.samplers.BaseSampler):
    """Wraps an Optuna sampler so that every proposal is moved to within the budget before its trial gets it.

    So the trial's parameters are the point that is scored, and what the sampler learns is the score of that point.

    Args:
        sampler: Proposes points.
        space: Distribution of every parameter.
        repair: Returns the point to be scored for a proposed one.
    """

    def __init__(
        self,
        sampler: optuna.samplers.BaseSampler,
        *,
        space: Mapping[str, IntDistribution],
        repair: Callable[[Mapping[str, int]], dict[str, int]],
    ) -> None:
        self._sampler = sampler
        self._space = dict(space)
        self._repair = repair

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space: a point can only be repaired as a whole."""
        del study, trial
        return dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a point that the wrapped sampler proposes, repaired.

        Args:
            study: The study.
            trial: The trial that is starting.
            search_space: Distributions by parameter name.
        """
        joint = self._sampler.infer_relative_search_space(study, trial)
        proposed = self._sampler.sample_relative(study, trial, joint)
        for name, distribution in search_space.items():
            if distribution.single():
                proposed[name] = self._space[name].low
            elif name not in proposed:
                proposed[name] = self._sampler.sample_independent(study, trial, name, distribution)
        repaired = self._repair(proposed)
        self._move_cma_point(study, trial, list(joint), proposed, repaired)
        return repaired

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the wrapped sampler's value for a parameter outside of the space.

        Args:
            study: The study.
            trial: The trial that asks.
            param_name: Name of the parameter.
            param_distribution: Its distribution.
        """
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Call the wrapped sampler's ``before_trial``."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Call the wrapped sampler's ``after_trial``.

        Args:
            study: The study.
            trial: The trial that ended.
            state: How it ended.
            values: Its objective values.
        """
        self._sampler.after_trial(study, trial, state, values)

    def _move_cma_point(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        names: Sequence[str],
        proposed: Mapping[str, int],
        repaired: Mapping[str, int],
    ) -> None:
        """Move the continuous point of Optuna's CMA-ES with margin to the repaired levels.

        It learns from this attribute instead of the parameters; axes are the parameters scaled to [0, 1].
        """
        point = study._storage.get_trial(trial._trial_id).system_attrs.get(CMA_POINT)
        if point is None:
            return
        for axis, name in enumerate(names):
            if repaired[name] != proposed[name]:
                point[axis] = repaired[name] / self._space[name].high
        study._storage.set_trial_system_attr(trial._trial_id, CMA_POINT, point)


class _InnerStudy:
    """A study in memory, over the level index of every unit, on which one of Optuna's samplers works.

    Args:
        problem: Units, ladders, budget.
        kind: As in ``OptunaSampler``.
        seed: Seeds the sampler and the repairs.
        offspring: Proposals a generation.
        direction: Of the values.

    Attributes:
        asked: Proposals without a result yet, by slot or by number of the outer trial.
        proposed: Number of proposals.
        repaired: Number of proposals that were changed by the repair.
    """

    def __init__(self, problem: Problem, *, kind: str, seed: int, offspring: int, direction: Direction) -> None:
        self._problem = problem
        self._kind = kind
        self._seed = seed
        self._space = {unit.name: IntDistribution(0, len(unit.levels) - 1) for unit in problem.units}
        try:
            native = _make(kind, seed % 2**32, offspring)
        except ImportError as error:
            raise EvosweepError(f"sampler={kind} needs {error.name}: pip install {error.name}") from error
        sampler = RepairedSampler(native, space=self._space, repair=self._repair)
        self._study = optuna.create_study(sampler=sampler, direction=direction)
        self._rng = generator(seed, kind)
        self.asked: dict[int, optuna.Trial] = {}
        self.proposed = self.repaired = 0

    def ask(self, key: int, *position: int | str) -> Genome:
        """Return a proposal, repaired; ``key`` identifies it later, ``position`` seeds its repair."""
        self._rng = generator(self._seed, self._kind, *position)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental samplers
            trial = self._study.ask(fixed_distributions=dict(self._space))
        self.asked[key] = trial
        return self._genome(trial.params)

    def tell(self, key: int, value: float | None, *, scored: Genome | None = None) -> None:
        """Report the value of a proposal; None if it failed.

        Args:
            key: As given to ``ask``. Without such a proposal, only ``scored`` is reported.
            value: Of the genome that was scored.
            scored: That genome, if it may be another one than was proposed (some of its units were fixed).
        """
        trial = self.asked.pop(key, None)
        same = trial is not None and (scored is None or (scored == self._genome(trial.params)).all())
        if trial is not None:
            succeeded = value is not None and same
            self._study.tell(trial, value if succeeded else None, state=None if succeeded else TrialState.FAIL)
        if scored is not None and value is not None and not same:
            params = dict(zip(self._space, map(int, scored), strict=True))
            self._study.add_trial(create_trial(value=value, params=params, distributions=dict(self._space)))

    def drop_asked(self) -> None:
        """Report all proposals without a result as failed."""
        for key in list(self.asked):
            self.tell(key, None)

    def _repair(self, point: Mapping[str, int]) -> dict[str, int]:
        proposed = self._genome(point)
        genome = proposed.copy()
        repair(self._problem, genome, self._rng)
        fill(self._problem, genome, self._rng)
        self.proposed += 1
        self.repaired += int((genome != proposed).any())
        return dict(zip(self._space, map(int, genome), strict=True))

    def _genome(self, params: Mapping[str, int]) -> Genome:
        return np.array([params[name] for name in self._space], dtype=np.int64)


class OptunaSampler(PopulationSampler):
    """One of Optuna's samplers, over one integer a unit (the index of its level).

    It knows nothing of the budget, so its proposals are repaired: units are lowered at random until the budget holds,
    then raised while it allows. The sampler learns the repaired allocation with its score; ``facts`` gives the share
    of proposals that were repaired. In a plain study, the history is proposed and reported again when the study
    is resumed. All scores must be on the same tokens, as it compares them across generations.

    Args:
        problem: Units, ladders, budget.
        kind: ``tpe``, ``cmaes``, ``nsga2``, ``gp``, ``qmc`` or ``random``.
        seed: Seeds the sampler underneath and the repairs.
        offspring: Proposals a generation.

    Raises:
        SettingError: There is no such kind.
        EvosweepError: A library that the sampler needs is not installed.
    """

    same_tokens = True

    def __init__(self, problem: Problem, *, kind: str, seed: int = 0, offspring: int = 64) -> None:
        super().__init__(problem, seed=seed)
        self.name = check_choice("kind", kind, KINDS)
        self.offspring = check_int("offspring", offspring, low=1)
        self._by_study: WeakKeyDictionary[optuna.Study, _InnerStudy] = WeakKeyDictionary()
        self._loop = self._inner("minimize")  # of ``genomes`` and ``learn``
        self._history: list[dict[str, Any]] = []  # of these: what ``restore`` repeats

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process starts from: settings and the state of the search loop."""
        settings = {"problem": self.problem, "kind": self.name, "seed": self.seed, "offspring": self.offspring}
        return {"settings": settings, "state": self.state()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore what ``__getstate__`` returned."""
        self.__init__(**state["settings"])  # type: ignore[misc]
        self.restore(state["state"])

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return a generation's proposals; those of the last generation that ``learn`` did not get have failed."""
        del parents
        with self._lock:
            self._loop.drop_asked()
            genomes = [self._loop.ask(slot, generation, slot) for slot in range(self.offspring)]
            self._history.append({"generation": generation, "proposed": _digest(genomes), "told": []})
            return genomes

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Report the first-stage scores of the proposals of ``genomes``; those without a finite score have failed."""
        with self._lock:
            for candidate in candidates:
                if candidate.slot in self._loop.asked:
                    score = candidate.scores[min(candidate.scores)] if candidate.scores else np.inf
                    value = float(score) if np.isfinite(score) else None
                    self._loop.tell(candidate.slot, value)
                    self._history[-1]["told"].append([candidate.slot, value])

    def state(self) -> dict[str, Any]:
        """Return every generation's index, a digest of its proposals, and its results: [slot, value or None]."""
        return {"kind": self.name, "generations": [dict(entry) for entry in self._history if entry["told"]]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Propose all generations of ``state`` again and report their results, so that the next one is the same.

        Raises:
            EvosweepError: The state is another sampler's, or this version of Optuna proposes something else.
        """
        if state.get("kind") != self.name:
            raise EvosweepError(f"the saved search was made by sampler {state.get('kind')!r}, this one is {self.name}")
        with self._lock:
            self._loop = self._inner("minimize")
            self._history = []
            for entry in state["generations"]:
                self.genomes(generation=entry["generation"], parents=())
                if self._history[-1]["proposed"] != entry["proposed"]:
                    raise EvosweepError(
                        f"sampler {self.name} proposes something else in generation {entry['generation']} than the "
                        "saved search did: another version of Optuna, another problem, seed or number of offspring"
                    )
                for slot, value in entry["told"]:
                    self._loop.tell(slot, value)
                self._history[-1]["told"] = [list(pair) for pair in entry["told"]]

    def size(self, generation: int) -> int:
        """Return the number of trials of a generation."""
        del generation
        return self.offspring

    def facts(self) -> Mapping[str, float]:
        """Return the share of proposals that did not fit or did not spend the budget before their repair."""
        return {"repaired": self._loop.repaired / max(self._loop.proposed, 1)}

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Record the constraint, and pass the value to the wrapped sampler.

        Args:
            study: The study.
            trial: The trial that ended.
            state: How it ended.
            values: Its objective values.
        """
        super().after_trial(study, trial, state, values)
        with self._lock:
            inner = self._by_study.get(study)
            if inner is not None:
                self._tell_trial(inner, trial, state, values)

    def _proposal(self, study: optuna.Study, trial: FrozenTrial) -> Genome:
        with self._lock:
            inner = self._by_study.get(study)
            if inner is None:
                maximizes = study.direction == optuna.study.StudyDirection.MAXIMIZE
                inner = self._by_study[study] = self._inner("maximize" if maximizes else "minimize")
                self._replay(inner, study, before=trial.number)
            return inner.ask(trial.number, "trial", trial.number)

    def _replay(self, inner: _InnerStudy, study: optuna.Study, *, before: int) -> None:
        """Bring a new inner study to where the one of an earlier process was when the outer study stopped."""
        names = self._distributions.keys()
        for past in study.get_trials(deepcopy=False)[:before]:
            if past.state.is_finished() and names <= past.params.keys():
                if not names <= past.system_attrs.get("fixed_params", {}).keys():
                    inner.ask(past.number, "trial", past.number)
                self._tell_trial(inner, past, past.state, past.values)

    def _tell_trial(
        self, inner: _InnerStudy, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Report an outer trial's value to an inner study, under the levels that the trial had in the end."""
        complete = (
            state == TrialState.COMPLETE and values is not None and self._distributions.keys() <= trial.params.keys()
        )
        if not complete or values is None:
            inner.tell(trial.number, None)
            return
        scored = self.problem.encode({name: trial.params[name] for name in self._distributions})
        inner.tell(trial.number, float(values[0]), scored=scored)

    def _inner(self, direction: Direction) -> _InnerStudy:
        return _InnerStudy(self.problem, kind=self.name, seed=self.seed, offspring=self.offspring, direction=direction)


def _digest(genomes: Sequence[Genome]) -> str:
    return digest([genome.tolist() for genome in genomes])


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
