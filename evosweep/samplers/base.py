"""Optuna samplers that propose whole generations.

A trial's allocation follows from the problem, the seed, the trial's number and the study's finished trials. The
sampler keeps only caches of these, so a study can be resumed, and workers share no memory. Our own loop asks for a
generation at a time; a plain ``study.optimize`` asks trial by trial and gets the same proposals.

There is no barrier between generations: a trial's parents are the best of all trials numbered below its generation
that have finished by now. So a worker never waits, and a trial that finishes late can be a parent from then on.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from evosweep.core.allocation import Allocation
from evosweep.core.checks import check_int
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Candidate
from evosweep.core.genomes import hashes_of
from evosweep.core.metrics import SIZE_MB
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.samplers.ranked_trials import RankedTrials
from evosweep.search.moves import fill, repair
from evosweep.search.protocols import Survey, Text

BUDGET = "budget_bits"  # name of the constraint: bits above the budget, feasible at 0 and below
PROBLEM = "problem"  # study attribute: fingerprint of the problem that it was made for


@dataclass
class _StudyCache:
    """What a sampler remembers of one study between two trials.

    Attributes:
        ranked: The study's best trials.
        key: Generation and ids of the parent trials that ``genomes`` were made for.
        genomes: The generation proposed last.
    """

    ranked: RankedTrials
    key: tuple[int, tuple[int, ...]] | None = None
    genomes: list[Genome] = field(default_factory=list)


class PopulationSampler(optuna.samplers.BaseSampler):
    """Base of evosweep's samplers: one categorical parameter a unit, its choices the unit's level names.

    Args:
        problem: Units, ladders, budget.
        seed: Seeds all randomness, together with what it is used for (generation, slot).

    Attributes:
        name: As in ``sampler=...``.
        columns: Columns of the units that must be measured before ``genomes`` is called.
        limit: Number of generations that it can propose; None if there is no end.
        same_tokens: Whether it compares scores of different generations, which then must be on the same tokens.
        population_size: μ, number of parents of the next generation.
        takes_starts: Whether generation 0 of our own loop may hold other genomes beside its own.
        ranks: Whether it says itself which candidates are better, by ``order``.
        more_starts: Genomes that generation 0 of our own loop has in addition.
        surveys: Whether it has single moves measured before it proposes, by ``survey``.
        holds_limits: Whether its proposals hold a problem's limits. ``axis``: figure of a front beside the loss.
    """

    name = ""
    population_size = 1
    limit: int | None = None
    columns: Sequence[str] = ()
    same_tokens = False
    takes_starts = False
    ranks = False
    surveys = False
    holds_limits = False
    axis = SIZE_MB

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.problem = problem
        self.more_starts: Sequence[Genome] = ()
        self.seed = check_int("seed", seed)
        self._distributions = unit_distributions(problem)
        self._others = optuna.samplers.RandomSampler(seed=self.seed % 2**32)
        self._caches: WeakKeyDictionary[optuna.Study, _StudyCache] = WeakKeyDictionary()
        self._lock = threading.RLock()
        self._hashes: dict[bytes, str] = {}  # of the parents of the last population

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process starts from: all but the caches."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_caches", "_lock")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore what ``__getstate__`` returned, with empty caches."""
        self.__dict__.update(state)
        self._caches = WeakKeyDictionary()
        self._lock = threading.RLock()

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the genomes that a generation proposes; an empty list ends the search.

        Args:
            generation: 0, 1, 2 ...
            parents: The best genomes so far, best first, at most ``population_size``; none in generation 0.
        """
        raise NotImplementedError

    def parent_index(self, *, generation: int, slot: int, count: int) -> int:
        """Return the index, among ``count`` parents, of the parent of a slot's genome.

        Args:
            generation: 0, 1, 2 ...
            slot: Index of the genome in its generation.
            count: Number of parents.
        """
        del generation, slot, count
        return 0

    def size(self, generation: int) -> int:
        """Return how many trials a generation has in ``study.optimize``; the same for all from 1 on."""
        raise NotImplementedError

    def population(self, *, generation: int, parents: Sequence[Genome]) -> list[Candidate]:
        """Return a generation's candidates, not yet scored.

        Args:
            generation: 0, 1, 2 ...
            parents: The best genomes so far, best first; none in generation 0.
        """
        self._hashes = hashes_of(self.problem, parents, known=self._hashes)
        hashes = [self._hashes[parent.tobytes()] for parent in parents]
        candidates = []
        genomes = self.genomes(generation=generation, parents=parents)
        for slot, genome in enumerate([*genomes, *(self.more_starts if generation == 0 else ())]):
            parent = None
            if hashes:
                parent = hashes[self.parent_index(generation=generation, slot=slot, count=len(hashes))]
            candidates.append(Candidate(slot=slot, genome=genome, parent=parent))
        return candidates

    def survey(self, *, generation: int, parents: Sequence[Genome], text: Text) -> Survey | None:
        """Return what is to be measured before a generation is proposed; None: nothing.

        Args:
            generation: 0, 1, 2 ...
            parents: As ``genomes`` will receive them.
            text: What measurements can be made on.
        """
        del generation, parents, text
        return None

    def survey_tokens(self, generation: int) -> int:
        """Return about how many tokens a generation's ``survey`` takes, before it is known."""
        del generation
        return 0

    def order(self, genomes: Sequence[Genome], losses: npt.NDArray[np.float64]) -> Sequence[int]:
        """Return candidate indices, best first: here, those with lower losses.

        Args:
            genomes: Shape (units,) each.
            losses: On the same tokens, shape (genomes,).
        """
        del genomes
        return list(map(int, np.argsort(losses, kind="stable")))

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Learn the scores of the generation proposed last. Samplers that learn from parents alone do nothing."""

    def state(self) -> dict[str, Any]:
        """Return, as JSON, what cannot be rebuilt from the parents; ``restore`` takes it in another process."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned: the next generation is the one that would have come next.

        Raises:
            EvosweepError: The state is that of another sampler.
        """
        if state:
            raise EvosweepError(
                f"sampler {self.name} keeps no state, but the saved search has some ({', '.join(sorted(state))}): "
                "it was made by another sampler"
            )

    def facts(self) -> Mapping[str, float]:
        """Return numbers about the sampler itself, logged with every generation."""
        return {}

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distribution of every unit's parameter, as a new dict that callers may change."""
        return dict(self._distributions)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return one parameter a unit."""
        del study, trial
        return self.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the levels of a trial's units, without the units that are fixed.

        Args:
            study: The study.
            trial: The trial that is starting.
            search_space: Distributions by parameter name.

        Raises:
            EvosweepError: The study has several objectives or was made for another problem, or the fixed units leave
                no allocation within the budget.
        """
        self._check_study(study)
        given = _given(study, trial)
        fixed = {name: value for name, value in given.items() if name in self._distributions}
        if len(fixed) == len(self._distributions):
            return {}
        genome = self._around(self._proposal(study, trial), fixed, trial)
        allocation = self.problem.decode(genome)
        return {name: level for name, level in allocation.items() if name in search_space and name not in fixed}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value for a parameter that is not a unit.

        Args:
            study: The study.
            trial: The trial that asks.
            param_name: Name of the parameter.
            param_distribution: Its distribution.

        Raises:
            EvosweepError: It is a unit, suggested with other choices than its levels.
        """
        if param_name in self._distributions:
            raise EvosweepError(
                f"unit {param_name} must be suggested as {self._distributions[param_name]}, got {param_distribution}"
            )
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Record the budget as a constraint, so that Optuna and its dashboard know which trials fit.

        Args:
            study: The study.
            trial: The trial that ended.
            state: Not read.
            values: Not read.
        """
        del state, values
        if self._distributions.keys() <= trial.params.keys():
            cost = self.problem.cost(self.problem.encode(_levels(trial, self._distributions)))
            if BUDGET not in trial.constraints:
                optuna.Trial(study, trial._trial_id).set_constraint(BUDGET, cost - self.problem.budget)

    def reseed_rng(self) -> None:
        """Reseed other parameters only: proposals are seeded by trial number, so workers share no random state."""
        self._others.reseed_rng()

    def _proposal(self, study: optuna.Study, trial: FrozenTrial) -> Genome:
        """Return the genome of a trial; write its generation and parent to the trial's system attributes."""
        generation, slot, first = self._position(trial.number)
        with self._lock:
            cache = self._cache(study)
            ranked = [] if generation == 0 else self._parents(study, cache, before=first)
            if not ranked:  # no trial has finished yet, as with many workers at the start
                generation = 0
            genomes = self._generation(study, cache, generation, ranked)
        if not genomes:
            raise EvosweepError(f"sampler {self.name} has no proposal for trial {trial.number}")
        storage = study._storage
        kind = type(self).__name__  # names of attributes as in Optuna's BaseGASampler
        storage.set_trial_system_attr(trial._trial_id, f"{kind}:generation", generation)
        slot %= len(genomes)
        if ranked:
            parent = ranked[self.parent_index(generation=generation, slot=slot, count=len(ranked))]
            storage.set_trial_system_attr(trial._trial_id, f"{kind}:parent", parent.number)
        return genomes[slot]

    def _cache(self, study: optuna.Study) -> _StudyCache:
        if study not in self._caches:
            maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
            self._caches[study] = _StudyCache(RankedTrials(self._distributions, maximize=maximize))
        return self._caches[study]

    def _generation(
        self, study: optuna.Study, cache: _StudyCache, generation: int, ranked: Sequence[FrozenTrial]
    ) -> list[Genome]:
        """Return all genomes of a generation, computed once for all of its trials that have the same parents."""
        ids = [trial._trial_id for trial in ranked]
        if cache.key != (generation, tuple(ids)):
            parents = [self.problem.encode(_levels(trial, self._distributions)) for trial in ranked]
            cache.genomes = self.genomes(generation=generation, parents=parents) or parents
            cache.key = (generation, tuple(ids))
            attribute = f"{type(self).__name__}:parent:{generation}"
            if ids and study._storage.get_study_system_attrs(study._study_id).get(attribute) != ids:
                study._storage.set_study_system_attr(study._study_id, attribute, ids)
        return cache.genomes

    def _position(self, number: int) -> tuple[int, int, int]:
        """Return a trial's generation, its slot, and the number of the generation's first trial."""
        start = self.size(0)
        if number < start:
            return 0, number, 0
        later = self.size(1)
        generation, slot = divmod(number - start, later)
        return generation + 1, slot, start + generation * later

    def _parents(self, study: optuna.Study, cache: _StudyCache, *, before: int) -> list[FrozenTrial]:
        """Return the best complete trials within the budget among those numbered below ``before``, best first."""
        cache.ranked.update(study.get_trials(deepcopy=False))
        return cache.ranked.best(self.population_size, before=before)

    def _around(self, genome: Genome, fixed: Mapping[str, Any], trial: FrozenTrial) -> Genome:
        """Return a genome with the fixed units set, and the others changed until it spends the budget again."""
        if not fixed:
            return genome
        indices = {unit.name: index for index, unit in enumerate(self.problem.units)}
        changed = genome.copy()
        kept = []
        for name, level in fixed.items():
            unit = self.problem.units[indices[name]]
            if level not in unit.level_names:
                raise SettingError(f"level of {name}", allowed=unit.level_names, got=level)
            changed[indices[name]] = unit.level_names.index(level)
            kept.append(indices[name])
        if (changed == genome).all():
            return genome
        rng = generator(self.seed, "fixed", trial.number)
        if not repair(self.problem, changed, rng, keep=tuple(kept)):
            raise EvosweepError(
                f"trial {trial.number}: the {len(kept)} units that are fixed leave no allocation within the budget of "
                f"{self.problem.budget} bits"
            )
        fill(self.problem, changed, rng, keep=tuple(kept))
        return changed

    def _check_study(self, study: optuna.Study) -> None:
        """Raise if a study has several objectives or another problem; write this problem to a new study."""
        if len(study.directions) != 1:
            raise EvosweepError(
                f"sampler {self.name} needs a study with one objective, study {study.study_name!r} has "
                f"{len(study.directions)}: create it with direction='minimize'"
            )
        known = study.user_attrs.get(PROBLEM)
        if known is None:
            study.set_user_attr(PROBLEM, self.problem.fingerprint)
        elif known != self.problem.fingerprint:
            raise EvosweepError(
                f"study {study.study_name!r} was made for another problem ({known}, this one is "
                f"{self.problem.fingerprint}): other units, levels, costs or budget; start a new study"
            )


def unit_distributions(problem: Problem) -> dict[str, BaseDistribution]:
    """Return one categorical parameter a unit, its choices the unit's level names."""
    return {unit.name: CategoricalDistribution(unit.level_names) for unit in problem.units}


def suggest_allocation(trial: optuna.Trial, problem: Problem) -> Allocation:
    """Return the allocation of a trial, for objectives of your own: suggests every unit's level."""
    return Allocation({unit.name: trial.suggest_categorical(unit.name, unit.level_names) for unit in problem.units})


def known_value(trial: optuna.Trial, problem: Problem) -> float | None:
    """Return the value of an earlier trial with the same allocation, and tag this one ``duplicate_of`` it.

    For objectives of your own that give an allocation the same value whenever they are asked::

        allocation = suggest_allocation(trial, problem)
        value = known_value(trial, problem)
        return my_loss(allocation) if value is None else value
    """
    wanted = {unit.name: trial.params.get(unit.name) for unit in problem.units}
    for other in trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if other.value is not None and wanted.items() <= other.params.items():
            trial.set_user_attr("duplicate_of", other.number)
            return float(other.value)
    return None


def _given(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that the sampler does not choose: enqueued ones, and those of a PartialFixedSampler."""
    partial = getattr(study.sampler, "_fixed_params", None)
    return {**(partial if isinstance(partial, dict) else {}), **trial.system_attrs.get("fixed_params", {})}


def _levels(trial: FrozenTrial, names: Mapping[str, Any]) -> dict[str, str]:
    return {name: trial.params[name] for name in names}
