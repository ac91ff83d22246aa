"""Optuna samplers that propose whole generations.

What a trial is follows from the problem, the seed, the trial's number and the study's finished trials; nothing of it
is kept in the sampler, so a study can be resumed, and workers need no common memory. Our own loop asks for a
generation at a time; a plain ``study.optimize`` asks trial by trial and gets the same proposals.

There is no barrier: a trial's parents are the best of all trials numbered below its generation that have finished by
now, whenever they finished. So a worker never waits, and a trial that finishes late is a parent from then on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from evosweep.core.allocation import Allocation
from evosweep.core.checks import check_int
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Candidate
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.moves import fill, repair

BUDGET = "budget_bits"  # name of the constraint: bits above the budget, feasible at 0 and below
PROBLEM = "problem"  # study attribute: fingerprint of the problem that it was made for


class PopulationSampler(optuna.samplers.BaseSampler):
    """Base of our samplers: one categorical parameter a unit, its choices the unit's level names.

    Args:
        problem: Units, ladders, budget.
        seed: Names all randomness together with the place where it is used.

    Attributes:
        name: As in ``sampler=...``.
        columns: Columns of the units that must be known before the problem is made.
        limit: Generations that it has anything to propose for; None if it never runs out.
        same_tokens: Whether it compares scores of different generations, which then must be on the same tokens.
        population_size: μ, how many of the best go on as parents.
    """

    name = ""
    population_size = 1
    limit: int | None = None
    columns: Sequence[str] = ()
    same_tokens = False

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self._distributions = unit_distributions(problem)
        self._others = optuna.samplers.RandomSampler(seed=self.seed % 2**32)

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return what a generation proposes; nothing ends the search.

        Args:
            generation: 0, 1, 2 ...
            parents: The best genomes so far, best first, at most ``population_size``; none in generation 0.
        """
        raise NotImplementedError

    def parent_place(self, *, generation: int, slot: int, count: int) -> int:
        """Return which of ``count`` parents a slot's proposal comes from."""
        del generation, slot, count
        return 0

    def size(self, generation: int) -> int:
        """Return how many trials a generation has in ``study.optimize``; the same for all from 1 on."""
        raise NotImplementedError

    def population(self, *, generation: int, parents: Sequence[Genome]) -> list[Candidate]:
        """Return a generation's candidates, unscored."""
        hashes = [self.problem.decode(parent).hash for parent in parents]
        return [
            Candidate(
                slot=slot,
                genome=genome,
                parent=hashes[self.parent_place(generation=generation, slot=slot, count=len(hashes))]
                if hashes
                else None,
            )
            for slot, genome in enumerate(self.genomes(generation=generation, parents=parents))
        ]

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Hear what became of the generation proposed last; what needs no memory of its own does nothing."""

    def facts(self) -> Mapping[str, float]:
        """Return numbers about the sampler itself, logged with every generation."""
        return {}

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Parameter of every unit; a copy, since wrappers of samplers delete from what they get."""
        return dict(self._distributions)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return one parameter a unit."""
        del study, trial
        return self.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the allocation of a trial: the whole of it, or what is left to choose around fixed units.

        Raises:
            EvosweepError: The study was made for another problem, or what is fixed leaves nothing to choose.
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
        """Draw parameters that are no unit at random; a unit with other choices is an error."""
        if param_name in self._distributions:
            raise EvosweepError(
                f"unit {param_name} must be suggested as {self._distributions[param_name]}, got {param_distribution}"
            )
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Record the budget as a constraint, so that Optuna and its dashboard know which trials fit."""
        del state, values
        if self._distributions.keys() <= trial.params.keys():
            cost = self.problem.cost(self.problem.encode(_levels(trial, self._distributions)))
            if BUDGET not in trial.constraints:
                optuna.Trial(study, trial._trial_id).set_constraint(BUDGET, cost - self.problem.budget)

    def reseed_rng(self) -> None:
        """Do nothing to the proposals: they come from places, so workers share no random state."""
        self._others.reseed_rng()

    def _proposal(self, study: optuna.Study, trial: FrozenTrial) -> Genome:
        """Return the genome of a trial, and note its generation and parent."""
        generation, slot, first = self._place(trial.number)
        ranked = [] if generation == 0 else self._parents(study, before=first)
        if not ranked:  # nothing has finished yet, as with many workers at the start
            generation = 0
        parents = [self.problem.encode(_levels(each, self._distributions)) for each in ranked]
        genomes = self.genomes(generation=generation, parents=parents) or parents
        if not genomes:
            raise EvosweepError(f"sampler {self.name} proposes nothing for trial {trial.number}")
        kind, storage = type(self).__name__, study._storage  # the names are BaseGASampler's
        storage.set_trial_system_attr(trial._trial_id, f"{kind}:generation", generation)
        slot %= len(genomes)
        if ranked:
            mine = ranked[self.parent_place(generation=generation, slot=slot, count=len(ranked))]
            storage.set_trial_system_attr(trial._trial_id, f"{kind}:parent", mine.number)
            key, ids = f"{kind}:parent:{generation}", [each._trial_id for each in ranked]
            if storage.get_study_system_attrs(study._study_id).get(key) != ids:
                storage.set_study_system_attr(study._study_id, key, ids)
        return genomes[slot]

    def _place(self, number: int) -> tuple[int, int, int]:
        """Return generation, slot, and the number of the generation's first trial."""
        start = self.size(0)
        if number < start:
            return 0, number, 0
        later = self.size(1)
        generation, slot = divmod(number - start, later)
        return generation + 1, slot, start + generation * later

    def _parents(self, study: optuna.Study, *, before: int) -> list[FrozenTrial]:
        """Return the best complete trials within the budget among those numbered below ``before``, best first."""
        names = self._distributions.keys()
        trials = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if trial.number < before
            and names <= trial.params.keys()
            and trial.value is not None
            and all(value <= 0 for value in trial.constraints.values())
        ]
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        best: dict[tuple[Any, ...], FrozenTrial] = {}  # no allocation twice
        for trial in sorted(trials, key=lambda trial: (sign * float(trial.value or 0.0), trial.number)):
            best.setdefault(tuple(trial.params[name] for name in names), trial)
            if len(best) == self.population_size:
                break
        return list(best.values())

    def _around(self, genome: Genome, fixed: Mapping[str, Any], trial: FrozenTrial) -> Genome:
        """Return a genome with some units as fixed, and the rest moved until it spends the budget again."""
        if not fixed:
            return genome
        places = {unit.name: place for place, unit in enumerate(self.problem.units)}
        changed, kept = genome.copy(), []
        for name, level in fixed.items():
            unit = self.problem.units[places[name]]
            if level not in unit.level_names:
                raise SettingError(f"level of {name}", allowed=unit.level_names, got=level)
            changed[places[name]] = unit.level_names.index(level)
            kept.append(places[name])
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
        """Raise where a study belongs to another problem; note it where it belongs to none."""
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
    """Suggest every unit's level in an objective of your own."""
    return Allocation({unit.name: trial.suggest_categorical(unit.name, unit.level_names) for unit in problem.units})


def known_value(trial: optuna.Trial, problem: Problem) -> float | None:
    """Return what an earlier trial of the same allocation scored, and tag this one ``duplicate_of`` it.

    For objectives of your own that give an allocation the same value whenever they are asked::

        allocation = suggest_allocation(trial, problem)
        value = known_value(trial, problem)
        return my_loss(allocation) if value is None else value
    """
    names = [unit.name for unit in problem.units]
    wanted = [trial.params.get(name) for name in names]
    for other in trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if other.value is not None and [other.params.get(name) for name in names] == wanted:
            trial.set_user_attr("duplicate_of", other.number)
            return float(other.value)
    return None


def _given(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that are not for the sampler to choose: enqueued ones, and those of a partial sampler."""
    partial = getattr(study.sampler, "_fixed_params", None)
    return {**(partial if isinstance(partial, dict) else {}), **trial.system_attrs.get("fixed_params", {})}


def _levels(trial: FrozenTrial, names: Mapping[str, Any]) -> dict[str, str]:
    return {name: trial.params[name] for name in names}
