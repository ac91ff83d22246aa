"""Requirements of a sampler, in evosweep's loop and in a plain ``study.optimize``."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import optuna
import pytest

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Candidate
from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import BUDGET, PopulationSampler, suggest_allocation
from evosweep.testing.problems import equal_costs, make_problem, unfilled_problem


class SamplerContract:
    """Test suite of samplers; subclass it and implement ``make``.

    Attributes:
        stopped_after: Generations before a search is stopped and restored.
    """

    stopped_after = 3

    @pytest.fixture
    def problem(self) -> Problem:
        """Return twelve units with three levels."""
        return make_problem()

    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        """Return the sampler.

        Args:
            problem: Units, ladders, budget.
            seed: Of its random choices.
        """
        raise NotImplementedError

    @pytest.mark.parametrize("generation", [0, 1, 2])
    def test_proposals_fit_the_budget(self, problem: Problem, generation: int) -> None:
        """Every proposal of every generation fits, and slots count from 0."""
        sampler = self.make(problem, 0)
        parents = [] if generation == 0 else [sampler.population(generation=0, parents=())[0].genome]
        candidates = sampler.population(generation=generation, parents=parents)
        assert [c.slot for c in candidates] == list(range(len(candidates)))
        assert all(problem.feasible(c.genome) for c in candidates)
        assert candidates or generation > 0

    def test_same_seed_same_proposals(self, problem: Problem) -> None:
        """All randomness comes from the seed."""
        first, second = (self.make(problem, 5).population(generation=0, parents=()) for _ in range(2))
        assert [tuple(c.genome) for c in first] == [tuple(c.genome) for c in second]

    def test_works_in_a_plain_study(self, problem: Problem) -> None:
        """Trials of ``study.optimize`` fit the budget too."""
        study = self._optimize(problem, trials=12)
        for trial in study.trials:
            assert problem.feasible(problem.encode(trial.params))

    def test_a_study_repeats_itself(self, problem: Problem) -> None:
        """A second study with the same seed has the same trials."""
        first, second = (self._optimize(problem, trials=9) for _ in range(2))
        assert [trial.params for trial in first.trials] == [trial.params for trial in second.trials]

    def test_a_study_resumed_goes_on_as_if_never_stopped(self, problem: Problem) -> None:
        """A new sampler on an unfinished study proposes what the first one would have."""
        whole = self._optimize(problem, trials=11)
        resumed = self._optimize(problem, trials=4)
        resumed.sampler = self.make(problem, 1)
        resumed.optimize(self._objective(problem), n_trials=7)
        assert [trial.params for trial in resumed.trials] == [trial.params for trial in whole.trials]

    def test_works_with_workers_that_finish_out_of_order(self, problem: Problem) -> None:
        """Threads share a sampler."""
        study = optuna.create_study(sampler=self.make(problem, 1))
        study.optimize(self._objective(problem), n_trials=12, n_jobs=4)
        assert len(study.trials) == 12
        assert all(problem.feasible(problem.encode(trial.params)) for trial in study.trials)

    def test_other_parameters_are_left_to_chance(self, problem: Problem) -> None:
        """An objective may have parameters that are no units."""
        study = optuna.create_study(sampler=self.make(problem, 1))

        def objective(trial: optuna.Trial) -> float:
            return trial.suggest_float("temperature", 0, 1) + len(suggest_allocation(trial, problem))

        study.optimize(objective, n_trials=3)
        assert all(0 <= trial.params["temperature"] <= 1 for trial in study.trials)

    def test_what_is_enqueued_stays_and_the_rest_is_repaired_around_it(self, problem: Problem) -> None:
        """``enqueue_trial`` fixes levels."""
        study = optuna.create_study(sampler=self.make(problem, 1))
        fixed = {unit.name: unit.level_names[-1] for unit in problem.units[:4]}
        for _ in range(3):
            study.enqueue_trial(fixed)
        study.optimize(self._objective(problem), n_trials=3)
        for trial in study.trials:
            assert fixed.items() <= trial.params.items()
            assert problem.feasible(problem.encode(trial.params))

    def test_a_partial_sampler_fixes_units(self, problem: Problem) -> None:
        """Optuna's ``PartialFixedSampler`` fixes levels."""
        fixed = {problem.units[2].name: problem.units[2].level_names[0]}
        sampler = optuna.samplers.PartialFixedSampler(fixed, self.make(problem, 1))
        study = optuna.create_study(sampler=sampler)
        study.optimize(self._objective(problem), n_trials=7)
        assert all(fixed.items() <= trial.params.items() for trial in study.trials)
        assert all(problem.feasible(problem.encode(trial.params)) for trial in study.trials)
        assert len(sampler.infer_relative_search_space(study, study.trials[0])) == len(problem.units) - 1

    def test_the_budget_is_a_constraint_that_optuna_knows(self, problem: Problem) -> None:
        """Optuna's dashboard marks trials above the budget."""
        study = optuna.create_study(sampler=self.make(problem, 1))
        study.enqueue_trial({unit.name: unit.level_names[-1] for unit in problem.units})
        study.optimize(self._objective(problem), n_trials=3)
        over, *fitting = [trial.constraints[BUDGET] for trial in study.trials]
        assert over == problem.most - problem.budget > 0 and all(value <= 0 for value in fitting)

    def test_a_study_of_another_problem_is_refused(self, problem: Problem) -> None:
        """Trials of two budgets or models must not be mixed."""
        study = self._optimize(problem, trials=2)
        study.sampler = self.make(unfilled_problem(), 1)
        with pytest.raises(EvosweepError, match="was made for another problem"):
            study.optimize(self._objective(problem), n_trials=1)

    def test_a_restored_sampler_proposes_the_same_next_generation(self, problem: Problem) -> None:
        """What ``state`` returns is enough to continue in another process."""
        first = self.make(problem, 3)
        parents: list[Genome] = []
        for generation in range(self.stopped_after):
            parents = self._search_step(first, problem, generation, parents)
        second = self.make(problem, 3)
        second.restore(json.loads(json.dumps(first.state())))
        third = self.make(problem, 3)
        third.restore(json.loads(json.dumps(second.state())))  # stopped a second time
        expected = first.population(generation=self.stopped_after, parents=parents)
        for other in (second, third):
            proposed = other.population(generation=self.stopped_after, parents=parents)
            assert [c.genome.tolist() for c in proposed] == [c.genome.tolist() for c in expected]
            assert other.facts() == first.facts()

    def test_a_state_of_another_sampler_is_refused(self, problem: Problem) -> None:
        """A state is not taken over silently."""
        with pytest.raises(EvosweepError, match="sampler"):
            self.make(problem, 0).restore({"kind": "other", "generations": []})

    def test_a_study_with_two_objectives_is_refused_at_its_first_trial(self, problem: Problem) -> None:
        """Before an objective has been computed."""
        study = optuna.create_study(sampler=self.make(problem, 0), directions=["minimize", "minimize"])
        scored = []

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            suggest_allocation(trial, problem)
            scored.append(trial.number)
            return 0.0, 0.0

        name = self.make(problem, 0).name.replace("+", r"\+")
        with pytest.raises(EvosweepError, match=f"sampler {name} needs a study with one objective"):
            study.optimize(objective, n_trials=2)
        assert not scored

    def test_a_sampler_used_for_a_second_study_acts_as_a_fresh_one(self, problem: Problem) -> None:
        """Nothing of the first study is left in the sampler."""
        fresh = optuna.create_study(sampler=self.make(problem, 1), direction="maximize")
        fresh.optimize(self._objective(problem), n_trials=12)
        used = self._optimize(problem, trials=7).sampler
        second = optuna.create_study(sampler=used, direction="maximize")
        second.optimize(self._objective(problem), n_trials=12)
        assert [trial.params for trial in second.trials] == [trial.params for trial in fresh.trials]

    def test_one_level_a_unit_is_the_only_proposal(self) -> None:
        """Where there is no choice, the search still runs."""
        only = [replace(unit, levels=unit.levels[:1]) for unit in make_problem().units]
        problem = Problem(tuple(only), budget=10**6)
        sampler = self.make(problem, 0)
        parents: list[Genome] = []
        for generation in range(2):
            assert not any(c.genome.any() for c in sampler.population(generation=generation, parents=parents))
            parents = [np.zeros(12, dtype=np.int64)]
        study = self._optimize(problem, trials=6)
        assert all(problem.encode(trial.params).tolist() == [0] * 12 for trial in study.trials)

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
    def test_levels_of_equal_cost_keep_the_budget(self, share: float) -> None:
        """Steps between levels may cost nothing."""
        problem = equal_costs(share)
        sampler = self.make(problem, 0)
        parents: list[Genome] = []
        for generation in range(3):
            candidates = sampler.population(generation=generation, parents=parents)
            assert all(problem.feasible(candidate.genome) for candidate in candidates)
            parents = [candidate.genome for candidate in candidates[: sampler.population_size]]

    def _search_step(
        self, sampler: PopulationSampler, problem: Problem, generation: int, parents: list[Genome]
    ) -> list[Genome]:
        """Score a generation, pass the scores to the sampler, and return the next parents."""
        weights = np.arange(len(problem.units)) % 5 - 2.0
        scored = [
            Candidate(c.slot, c.genome, {0: float(c.genome @ weights)} if c.slot != 1 else {})  # one was never scored
            for c in sampler.population(generation=generation, parents=parents)
        ]
        sampler.learn(scored)
        ranked = sorted((c for c in scored if c.scores), key=lambda c: c.scores[0])
        return [*(c.genome for c in ranked), *parents][: sampler.population_size]

    def _objective(self, problem: Problem) -> Callable[[optuna.Trial], float]:
        def objective(trial: optuna.Trial) -> float:
            genome = problem.encode(suggest_allocation(trial, problem))
            return float(sum((index % 5) * level for index, level in enumerate(genome)))

        return objective

    def _optimize(self, problem: Problem, *, trials: int) -> optuna.Study:
        study = optuna.create_study(sampler=self.make(problem, 1))
        study.optimize(self._objective(problem), n_trials=trials)
        return study
