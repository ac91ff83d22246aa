"""What every population sampler must do, in our loop and in a plain ``study.optimize``."""

import optuna
import pytest

from evosweep.core.problem import Problem
from evosweep.samplers.base import PopulationSampler, suggest_allocation
from tests.conftest import make_problem


class SamplerContract:
    """Subclass with ``make``."""

    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        raise NotImplementedError

    @pytest.mark.parametrize("generation", [0, 1, 2])
    def test_proposals_fit_the_budget(self, problem: Problem, generation: int) -> None:
        sampler = self.make(problem, 0)
        elite = None if generation == 0 else sampler.population(generation=0, elite=None)[0].genome
        candidates = sampler.population(generation=generation, elite=elite)
        assert [each.slot for each in candidates] == list(range(len(candidates)))
        assert all(problem.feasible(each.genome) for each in candidates)
        assert candidates or generation > 0

    def test_same_seed_same_proposals(self, problem: Problem) -> None:
        first, second = (self.make(problem, 5).population(generation=0, elite=None) for _ in range(2))
        assert [tuple(each.genome) for each in first] == [tuple(each.genome) for each in second]

    def test_works_in_a_plain_study(self, problem: Problem) -> None:
        study = self._optimize(problem, trials=12)
        for trial in study.trials:
            assert problem.feasible(problem.encode(trial.params))

    def test_a_study_repeats_itself(self, problem: Problem) -> None:
        first, second = (self._optimize(problem, trials=9) for _ in range(2))
        assert [trial.params for trial in first.trials] == [trial.params for trial in second.trials]

    def test_a_study_resumed_goes_on_as_if_never_stopped(self, problem: Problem) -> None:
        whole = self._optimize(problem, trials=11)
        parts = self._optimize(problem, trials=4)
        parts.sampler = self.make(problem, 1)
        parts.optimize(self._objective(problem), n_trials=7)
        assert [trial.params for trial in parts.trials] == [trial.params for trial in whole.trials]

    def test_works_with_workers_that_finish_out_of_order(self, problem: Problem) -> None:
        study = optuna.create_study(sampler=self.make(problem, 1))
        study.optimize(self._objective(problem), n_trials=12, n_jobs=4)
        assert len(study.trials) == 12
        assert all(problem.feasible(problem.encode(trial.params)) for trial in study.trials)

    def test_other_parameters_are_left_to_chance(self, problem: Problem) -> None:
        study = optuna.create_study(sampler=self.make(problem, 1))

        def objective(trial: optuna.Trial) -> float:
            return trial.suggest_float("temperature", 0, 1) + len(suggest_allocation(trial, problem))

        study.optimize(objective, n_trials=3)
        assert all(0 <= trial.params["temperature"] <= 1 for trial in study.trials)

    def _objective(self, problem: Problem):
        def objective(trial: optuna.Trial) -> float:
            genome = problem.encode(suggest_allocation(trial, problem))
            return float(sum((place % 5) * level for place, level in enumerate(genome)))

        return objective

    def _optimize(self, problem: Problem, *, trials: int) -> optuna.Study:
        study = optuna.create_study(sampler=self.make(problem, 1))
        study.optimize(self._objective(problem), n_trials=trials)
        return study


def unfilled_problem() -> Problem:
    """Return a problem whose budget is not what one level everywhere costs."""
    return make_problem(make_problem().budget + 450)
