from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.trial import TrialState

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Candidate
from evosweep.core.problem import Problem
from evosweep.samplers.base import PopulationSampler, suggest_allocation
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.optuna_native import OptunaSampler
from evosweep.samplers.random import RandomFeasibleSampler
from evosweep.testing import SamplerContract
from evosweep.testing.problems import make_problem

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
KINDS = ("tpe", "cmaes", "nsga2", "gp", "qmc")


class TestTPE(SamplerContract):
    kind = "tpe"

    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return OptunaSampler(problem, kind=self.kind, seed=seed, offspring=4)

    def test_it_learns_in_ask_and_tell(self, problem: Problem) -> None:
        weights = np.arange(len(problem.units)) % 5 - 2.0
        sampler, best = OptunaSampler(problem, kind=self.kind, seed=1, offspring=8), []
        for generation in range(12):
            told = [
                type(each)(each.slot, each.genome, {0: float(each.genome @ weights)})
                for each in sampler.population(generation=generation, parents=())
            ]
            sampler.learn(told)
            best.append(min(each.scores[0] for each in told))
        assert min(best[6:]) <= min(best[:2])
        assert 0 < sampler.facts()["repaired"] <= 1


class TestCmaEs(TestTPE):
    kind = "cmaes"


class TestNSGA2(TestTPE):
    kind = "nsga2"


class TestQMC(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return OptunaSampler(problem, kind="qmc", seed=seed, offspring=4)


class TestGP(SamplerContract):
    stopped_after = 1  # it fits a process at every proposal

    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return OptunaSampler(problem, kind="gp", seed=seed, offspring=8)


def test_a_sampler_that_optuna_has_not(problem: Problem) -> None:
    with pytest.raises(SettingError, match=r"kind must be one of tpe, .* got 'tpee' \(did you mean 'tpe'\?\)"):
        OptunaSampler(problem, kind="tpee")


@pytest.mark.parametrize("kind", KINDS)
class TestWhatIsLearned:
    def inner(self, sampler: OptunaSampler) -> optuna.Study:
        return sampler._loop._study

    def test_the_score_is_told_for_the_genome_that_was_scored(self, problem: Problem, kind: str) -> None:
        sampler = OptunaSampler(problem, kind=kind, seed=1, offspring=6)
        scored = {}
        for generation in range(3):
            candidates = sampler.population(generation=generation, parents=())
            sampler.learn([Candidate(c.slot, c.genome, {0: value_of(c.genome)}) for c in candidates])
            scored |= {tuple(c.genome.tolist()): value_of(c.genome) for c in candidates}
        trials = self.inner(sampler).trials
        assert len(trials) == 18 and sampler.facts()["repaired"] > 0.5
        for trial in trials:
            genome = tuple(trial.params[unit.name] for unit in problem.units)
            assert problem.feasible(np.array(genome)) and trial.value == scored[genome]

    def test_what_was_fixed_is_told_as_it_was_scored(self, problem: Problem, kind: str) -> None:
        sampler = OptunaSampler(problem, kind=kind, seed=1, offspring=4)
        study = optuna.create_study(sampler=sampler)
        fixed = {unit.name: unit.level_names[-1] for unit in problem.units[:4]}
        whole = {unit.name: unit.level_names[0] for unit in problem.units}
        for enqueued in (None, fixed, whole, None, fixed):
            if enqueued:
                study.enqueue_trial(enqueued)
            study.optimize(lambda trial: value_of(problem.encode(suggest_allocation(trial, problem))), n_trials=1)
        told = [
            ({name: problem.units[n].level_names[trial.params[name]] for n, name in enumerate(whole)}, trial.value)
            for trial in sampler._by_study[study]._study.trials
            if trial.state == TrialState.COMPLETE
        ]
        assert told == [(trial.params, trial.value) for trial in study.trials]


def value_of(genome: np.ndarray) -> float:
    return float(genome @ (np.arange(len(genome)) % 5 - 2.0))


def test_the_cma_point_is_that_of_the_repaired_levels(problem: Problem) -> None:
    sampler = OptunaSampler(problem, kind="cmaes", seed=1, offspring=6)
    for generation in range(3):
        candidates = sampler.population(generation=generation, parents=())
        sampler.learn([Candidate(c.slot, c.genome, {0: value_of(c.genome)}) for c in candidates])
    names = sorted(unit.name for unit in problem.units)
    points = [trial for trial in sampler._loop._study.trials if "x_for_tell" in trial.system_attrs]
    assert len(points) == 12
    for trial in points:
        levels = np.clip(np.rint(np.array(trial.system_attrs["x_for_tell"]) * 2), 0, 2).astype(int)
        assert levels.tolist() == [trial.params[name] for name in names]


def test_a_state_that_this_sampler_would_not_make_is_refused(problem: Problem) -> None:
    first = OptunaSampler(problem, kind="tpe", seed=1, offspring=4)
    candidates = first.population(generation=0, parents=())
    first.learn([Candidate(c.slot, c.genome, {0: value_of(c.genome)}) for c in candidates])
    with pytest.raises(EvosweepError, match="another version of Optuna, another problem, seed"):
        OptunaSampler(problem, kind="tpe", seed=2, offspring=4).restore(first.state())
    with pytest.raises(EvosweepError, match="was made by sampler 'tpe', this one is nsga2"):
        OptunaSampler(problem, kind="nsga2", seed=1, offspring=4).restore(first.state())


@pytest.mark.parametrize("kind", KINDS)
class TestOptunasOwnSuite(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self, kind: str) -> Callable[[], PopulationSampler]:
        return lambda: OptunaSampler(make_problem(), kind=kind, seed=0, offspring=4)


@pytest.mark.parametrize("kind", [EvoPressSampler, RandomFeasibleSampler])
class TestOptunasOwnSuiteForOurs(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self, kind: type) -> Callable[[], PopulationSampler]:
        return lambda: kind(make_problem(), seed=0, offspring=4)
