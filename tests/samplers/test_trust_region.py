import numpy as np
import pytest

from evosweep.allocators.ilp import ILP
from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.samplers.base import PopulationSampler
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.trust_region import TrustRegionSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.search.protocols import Text
from evosweep.search.state import SearchState
from evosweep.testing import SamplerContract
from evosweep.testing.problems import make_problem


class TestTrustRegionSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return TrustRegionSampler(problem, seed=seed, offspring=4)


class TestWarmStartedTrustRegionSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return TrustRegionSampler(problem, seed=seed, offspring=4, start=ILP())


class TestInformedEvoPress(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return EvoPressSampler(problem, seed=seed, offspring=4, proposals="informed")


class Landscape:
    """A scorer with additive effects, pairs that interact, and token noise that all genomes share or have alone."""

    seq_len = 64

    def __init__(self, problem: Problem, *, noise: float = 0.0, pairs: float = 0.0) -> None:
        rng = generator(0, "landscape")
        self.problem = problem
        self.tables = rng.gamma(1.0, size=(len(problem.units), 1)) * 4.0 ** -np.arange(problem.costs.shape[1])
        self.pairs = pairs * rng.normal(size=(len(problem.units),) * 2)
        self.noise = noise
        self.tokens = 0

    def true(self, genomes: np.ndarray) -> np.ndarray:
        harms = self.tables[np.arange(len(self.problem.units)), genomes]
        return harms.sum(axis=1) + np.einsum("gi,ij,gj->g", harms, self.pairs, harms)

    def losses(self, genomes, *, generation, stage, tokens, windows, length):
        count = windows.stop - windows.start
        self.tokens += len(genomes) * count * length
        noise = np.stack(
            [
                generator(1, generation, stage, windows.start, *map(int, genome)).normal(size=(count, length - 1))
                for genome in genomes
            ]
        )
        return self.true(genomes)[:, None, None] + self.noise * noise

    def score(self, genomes, *, generation, stage, tokens):
        self.tokens += len(genomes) * tokens
        draws = [generator(2, generation, stage, *map(int, genome)).normal() for genome in genomes]
        return self.true(genomes) + self.noise * np.array(draws) / tokens**0.5

    def score_all(self, genomes, *, limit):
        return self.true(genomes)

    def final_tokens(self, limit):
        return 64 * self.seq_len if limit is None else limit

    def validate(self, genome):
        return {"kl": float(self.true(genome[None])[0]), "ppl": 1.0}


PLAN = Plan.of(generations=4, stages=[{"survivors": 4, "tokens": 128}, {"survivors": 1, "tokens": 512}])


def search(problem: Problem, scorer: Landscape, *, sampler=None, generations: int = 4, **more):
    sampler = sampler or TrustRegionSampler(problem, seed=0, probe_tokens=256)
    plan = Plan.of(generations=generations, stages=[{"survivors": 4, "tokens": 128}, {"survivors": 1, "tokens": 512}])
    dense = {"kl": 0.0, "ppl": 1.0}
    return run_search(name="x", sampler=sampler, scorer=scorer, plan=plan, dense=dense, listeners=[], **more)


def test_without_noise_it_ends_at_the_optimum_of_additive_harms() -> None:
    problem = make_problem()
    scorer = Landscape(problem)
    result = search(problem, scorer)
    units = tuple(
        type(unit)(
            unit.name,
            unit.numel,
            unit.block,
            unit.levels,
            {f"kl_around_top/{level.name}": scorer.tables[row, column] for column, level in enumerate(unit.levels)},
        )
        for row, unit in enumerate(problem.units)
    )
    best = ILP().allocate(Problem(units, budget=problem.budget))
    assert scorer.true(problem.encode(result.allocation)[None]) == pytest.approx(scorer.true(best[None]), rel=0.02)


def test_measurements_count_as_tokens_of_the_search() -> None:
    problem = make_problem()
    scorer = Landscape(problem, noise=0.1)
    result = search(problem, scorer)
    assert result.tokens == scorer.tokens
    probes = 24 * 256  # each unit has two moves from 3 bits
    assert 0.5 * probes < result.generations[1].tokens < 2 * probes


@pytest.mark.parametrize("kind", ["trust_region", "informed"])
def test_a_search_that_continues_gives_what_it_would_have_given(tmp_path, kind: str) -> None:
    problem = make_problem()

    def run(**more):
        sampler: PopulationSampler = TrustRegionSampler(problem, seed=0, probe_tokens=256)
        if kind == "informed":
            sampler = EvoPressSampler(problem, seed=0, offspring=6, proposals="informed", survey_every=2)
        return search(problem, Landscape(problem, noise=0.3, pairs=0.1), sampler=sampler, **more)

    whole = run()
    path = tmp_path / "state.jsonl"
    run(generations=2, state_path=path)
    resumed = run(state=SearchState.read(path, problem=problem))
    assert [record.elite for record in resumed.generations] == [record.elite for record in whole.generations]
    assert [record.stages for record in resumed.generations] == [record.stages for record in whole.generations]


def test_regions_halve_while_the_incumbent_stays_and_are_whole_again_when_it_moves() -> None:
    problem = make_problem()
    sampler = TrustRegionSampler(problem, changes=[3, 8, None], offspring=6)
    text = Text(windows=64, seq_len=64)
    parent = problem.uniform()
    found = []
    for generation in range(1, 5):
        sampler.survey(generation=generation, parents=[parent], text=text)
        found.append(sampler.trust_region.limits)
    assert found == [(3, 8, None), (2, 4, 6), (2, 3), (2,)]
    again = TrustRegionSampler(problem, changes=[3, 8, None], offspring=6)
    again.restore(sampler.state())
    assert again.trust_region.limits == (2,)
    moved = parent.copy()
    moved[[0, 1]] = [0, 2]
    again.survey(generation=5, parents=[moved], text=text)
    assert again.trust_region.limits == (3, 8, None)


@pytest.mark.parametrize(
    ("setting", "value"), [("changes", []), ("changes", 6), ("changes", [0]), ("probe_tokens", 0), ("offspring", 0)]
)
def test_bad_settings_are_refused(problem: Problem, setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=setting):
        TrustRegionSampler(problem, **{setting: value})  # type: ignore[arg-type]


def test_informed_offspring_are_better_than_those_drawn_by_lot() -> None:
    problem = make_problem()
    scorer = Landscape(problem, noise=0.05)
    means = []
    for proposals in ("random", "informed"):
        sampler = EvoPressSampler(problem, seed=0, offspring=16, proposals=proposals)
        result = search(problem, scorer, sampler=sampler, generations=1)
        means.append(np.mean([candidate.scores[0] for candidate in result.generations[1].candidates]))
    start = scorer.true(problem.uniform()[None])[0]
    assert means[1] < start < means[0]
