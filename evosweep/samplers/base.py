"""Optuna samplers that propose whole generations.

Each keeps no state: what a trial is follows from the problem, the seed, the trial's number and the study's finished
trials. Our own loop asks for a generation at a time; a plain ``study.optimize`` asks trial by trial and gets the same
proposals.
"""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from evosweep.core.checks import check_int
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Candidate
from evosweep.core.problem import Allocation, Genome, Problem


class PopulationSampler(optuna.samplers.BaseSampler):
    """Base of our samplers: one categorical parameter a unit, its choices the unit's level names.

    Args:
        problem: Units, ladders, budget.
        seed: Names all randomness together with the place where it is used.

    Attributes:
        name: As in ``sampler=...``.
        columns: Columns of the units that must be known before the problem is made.
        limit: Generations that it has anything to propose for; None if it never runs out.
    """

    name = ""
    limit: int | None = None
    columns: Sequence[str] = ()

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self._others = optuna.samplers.RandomSampler(seed=self.seed % 2**32)

    def genomes(self, *, generation: int, elite: Genome | None) -> list[Genome]:
        """Return what a generation proposes; nothing ends the search.

        Args:
            generation: 0, 1, 2 ...
            elite: The best genome so far; None in generation 0.
        """
        raise NotImplementedError

    def size(self, generation: int) -> int:
        """Return how many trials a generation has in ``study.optimize``; the same for all from 1 on."""
        raise NotImplementedError

    def population(self, *, generation: int, elite: Genome | None) -> list[Candidate]:
        """Return a generation's candidates, unscored."""
        parent = None if elite is None else self.problem.decode(elite).hash
        genomes = self.genomes(generation=generation, elite=elite)
        return [Candidate(slot=slot, genome=genome, parent=parent) for slot, genome in enumerate(genomes)]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Parameter of every unit."""
        return unit_distributions(self.problem)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return one parameter a unit."""
        del study, trial
        return self.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the whole allocation of a trial."""
        del search_space
        generation, slot, first = self._place(trial.number)
        elite = None if generation == 0 else self._elite(study, before=first)
        if elite is None:  # nothing has finished yet, as with many workers at the start
            generation = 0
        genomes = self.genomes(generation=generation, elite=elite)
        genome = genomes[slot % len(genomes)] if genomes else elite
        if genome is None:
            raise EvosweepError(f"sampler {self.name} proposes nothing for trial {trial.number}")
        return dict(self.problem.decode(genome))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw parameters that are no unit at random; a unit with other choices is an error."""
        if param_name in self.distributions:
            raise EvosweepError(
                f"unit {param_name} must be suggested as {self.distributions[param_name]}, got {param_distribution}"
            )
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Do nothing to the proposals: they come from places, so workers share no random state."""
        self._others.reseed_rng()

    def _place(self, number: int) -> tuple[int, int, int]:
        """Return generation, slot, and the number of the generation's first trial."""
        start = self.size(0)
        if number < start:
            return 0, number, 0
        later = self.size(1)
        generation, slot = divmod(number - start, later)
        return generation + 1, slot, start + generation * later

    def _elite(self, study: optuna.Study, *, before: int) -> Genome | None:
        """Return the best complete allocation among trials numbered below ``before``."""
        names = set(self.distributions)
        trials = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if trial.number < before and names <= set(trial.params) and trial.value is not None
        ]
        if not trials:
            return None
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        best = min(trials, key=lambda trial: (sign * float(trial.value or 0.0), trial.number))
        return self.problem.encode({name: best.params[name] for name in names})


def unit_distributions(problem: Problem) -> dict[str, BaseDistribution]:
    """Return one categorical parameter a unit, its choices the unit's level names."""
    return {unit.name: CategoricalDistribution(unit.level_names) for unit in problem.units}


def suggest_allocation(trial: optuna.Trial, problem: Problem) -> Allocation:
    """Suggest every unit's level in an objective of your own."""
    return Allocation({unit.name: trial.suggest_categorical(unit.name, unit.level_names) for unit in problem.units})


