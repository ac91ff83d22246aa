from dataclasses import replace

import numpy as np
import pytest

from evosweep.core.errors import EvosweepError, SettingError, StoreError
from evosweep.core.problem import Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.qvlm import QVLMSampler
from evosweep.search.block_groups import ENTROPY, dependent_groups, part
from evosweep.testing import SamplerContract
from evosweep.testing.problems import make_problem


def with_entropy(problem: Problem, entropies=(1.0, 3.0, 2.0, 3.5)) -> Problem:
    units = [replace(unit, columns={**unit.columns, ENTROPY: float(entropies[unit.block])}) for unit in problem.units]
    return replace(problem, units=tuple(units))


class TestQVLMSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return QVLMSampler(with_entropy(problem), seed=seed, offspring=4)


class TestEntropyGroups(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return EvoPressSampler(with_entropy(problem), seed=seed, offspring=4, group="entropy", cross=0.2)


@pytest.mark.parametrize(
    ("entropies", "most", "expected"),
    [
        ([1.0, 3.0, 2.0, 3.5], 3, [0, 0, 1, 1]),  # the boundaries into blocks 1 and 3 have the highest entropy
        ([9.0, 1.0, 2.0, 3.0], 3, [0, 1, 1, 1]),  # what enters the first block joins nothing
        ([9.0, 1.0, 2.0, 3.0], 2, [0, 1, 1, 2]),
    ],
)
def test_blocks_are_joined_where_entropy_is_high(entropies: list[float], most: int, expected: list[int]) -> None:
    labels = dependent_groups(with_entropy(make_problem(), entropies), most=most)
    assert labels.reshape(4, 3).tolist() == [[label] * 3 for label in expected]


def test_a_generation_changes_one_group_and_keeps_its_share() -> None:
    problem = with_entropy(make_problem())
    sampler = QVLMSampler(problem, seed=0, offspring=8)
    parent = problem.uniform()
    groups = dependent_groups(problem)
    for generation in (1, 2, 3, 5):
        changed = set()
        for genome in sampler.genomes(generation=generation, parents=[parent]):
            where = set(groups[genome != parent].tolist())
            assert len(where) == 1
            inside = groups == where.pop()
            changed |= set(groups[inside].tolist())
            assert problem.prices(genome)[inside].sum() <= problem.prices(parent)[inside].sum()
        assert changed == {[0, 1, 0, 1][[1, 2, 3, 5].index(generation)]}


def test_all_of_evopress_settings_are_its_own() -> None:
    problem = with_entropy(make_problem())
    sampler = QVLMSampler(problem, offspring=8, population_size=2, cross=0.0, max_flips=1)
    assert sampler.population_size == 2 and sampler.search.mutation.cross == 0.0
    parents = [problem.uniform(), sampler.genomes(generation=1, parents=[problem.uniform()])[0]]
    members = sampler._group(1)
    found = sampler.genomes(generation=1, parents=parents)
    for slot, genome in enumerate(found):
        parent = parents[sampler.parent_index(generation=1, slot=slot, count=2)]
        changed = np.flatnonzero(genome != parent)
        assert 0 < len(changed) <= 2 and set(changed.tolist()) <= set(members.tolist())
    with pytest.raises(SettingError, match="offspring must be"):
        QVLMSampler(problem, offspring=0)


def test_swaps_stay_within_dependent_blocks() -> None:
    problem = with_entropy(make_problem())
    groups = dependent_groups(problem)
    sampler = EvoPressSampler(problem, seed=0, offspring=32, group="entropy", cross=0.0, max_flips=1)
    assert ENTROPY in sampler.columns
    parent = problem.uniform()
    for genome in sampler.genomes(generation=1, parents=[parent]):
        assert len(np.unique(groups[genome != parent])) == 1


def test_the_part_of_a_group_has_what_others_leave() -> None:
    problem = make_problem()
    genome = problem.uniform()
    inside = part(problem, np.array([0, 1, 2]), genome)
    assert inside.budget == problem.budget - int(problem.costs[np.arange(3, 12), genome[3:]].sum())


def test_an_entropy_that_is_constant_groups_nothing() -> None:
    problem = with_entropy(make_problem(), (2.0, 2.0, 2.0, 2.0))
    with pytest.raises(EvosweepError, match="activation_entropy is the same for all 4 blocks: it groups nothing"):
        dependent_groups(problem)
    assert len(np.unique(dependent_groups(problem, most=1))) == 4


def test_bad_settings_and_missing_columns_are_refused() -> None:
    with pytest.raises(SettingError, match="joined"):
        QVLMSampler(make_problem(), joined=2.0)
    with pytest.raises(StoreError, match=ENTROPY):
        QVLMSampler(make_problem()).genomes(generation=1, parents=[make_problem().uniform()])
