from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.testing.pytest_samplers import BasicSamplerTestCase

from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.optuna_native import OptunaSampler
from evosweep.samplers.random import RandomFeasibleSampler
from tests.conftest import make_problem
from tests.contracts.sampler import SamplerContract

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
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return OptunaSampler(problem, kind="gp", seed=seed, offspring=8)


def test_a_sampler_that_optuna_has_not(problem: Problem) -> None:
    with pytest.raises(SettingError, match=r"kind must be one of tpe, .* got 'tpee' \(did you mean 'tpe'\?\)"):
        OptunaSampler(problem, kind="tpee")


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
