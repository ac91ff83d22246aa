from itertools import product

import numpy as np
import pytest

from evosweep.allocators.interactions import Additivity, Interactions, positive
from evosweep.allocators.pairs import Pairs, least_quadratic
from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.samplers.static import AllocatorSampler

UNITS = 8
LEVELS = 3


def quadratic(seed: int = 0) -> tuple[Problem, np.ndarray, np.ndarray]:
    """Return a problem measured on a true quadratic loss: its units' single effects, and ρ between four blocks."""
    rng = np.random.default_rng(seed)
    harms = rng.gamma(2.0, size=(UNITS, 1)) * np.array([1.0, 0.25, 0.0])
    factors = rng.normal(size=(4, 2))
    rho = factors @ factors.T
    rho /= 1.2 * np.sqrt(np.outer(np.diag(rho), np.diag(rho)))
    blocks = np.arange(UNITS) // 2
    uniform = np.ones(UNITS, dtype=int)

    def rise(lowered: set[int]) -> float:
        genome = np.where(np.isin(blocks, list(lowered)), uniform, LEVELS - 1)
        return loss(harms, rho, genome)

    units = []
    for index in range(UNITS):
        block = int(blocks[index])
        columns = {f"kl_around_top/l{level}": harms[index, level] for level in range(LEVELS)}
        for other in range(4):
            own = rise({block})
            columns[f"kl_pairs_blocks/{other}"] = own if other == block else rise({block, other}) - own - rise({other})
        columns["kl_pairs_blocks/all"] = rise(set(range(4)))
        size = 100 + 50 * (index % 3)
        levels = tuple(Level(f"l{level}", size * (level + 2)) for level in range(LEVELS))
        units.append(Unit(f"blocks.{block}.linear_{index % 2}", size, block, levels, columns))
    return Problem(tuple(units), budget=sum(unit.levels[1].cost for unit in units)), harms, rho


def loss(harms: np.ndarray, rho: np.ndarray, genome: np.ndarray) -> float:
    """Return Σ h + Σ_{u<v} 2 ρ √(h_u h_v), unit by unit in float64."""
    single = harms[np.arange(UNITS), genome]
    total = float(single.sum())
    for one in range(UNITS):
        for other in range(one):
            total += 2 * rho[one // 2, other // 2] * (single[one] * single[other]) ** 0.5
    return total


def test_the_model_is_the_quadratic_loss_that_it_was_measured_on() -> None:
    problem, harms, rho = quadratic()
    model = Interactions.of(problem, "blocks")
    np.testing.assert_allclose(model.matrix, rho, atol=1e-6)
    for seed in range(20):
        genome = np.random.default_rng(seed).integers(0, LEVELS, UNITS)
        assert model.value(genome) == pytest.approx(loss(harms, rho, genome), rel=0.01, abs=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    problem, _, _ = quadratic(seed)
    model = Interactions.of(problem, "blocks")
    every = [np.array(genome) for genome in product(range(LEVELS), repeat=UNITS)]
    best = min(model.value(genome) for genome in every if problem.feasible(genome))
    found = least_quadratic(problem, model, rounds=12, node_limit=2000)
    assert problem.feasible(found.genome)
    assert found.value == model.value(found.genome) == pytest.approx(best, rel=1e-5)
    assert found.bound <= best + 1e-9
    assert found.bound > 0.9 * best


def test_interactions_change_the_choice() -> None:
    problem, harms, rho = quadratic(1)
    chosen = Pairs().allocate(problem)
    flat = np.zeros_like(rho)
    model = Interactions.of(problem, "blocks")
    additive = least_quadratic(
        problem, Interactions(model.harms, model.groups, flat, model.labels, model.measured), rounds=12, node_limit=100
    ).genome
    assert (chosen != additive).any()
    assert loss(harms, rho, chosen) < loss(harms, rho, additive)


def test_the_report_says_how_far_effects_add_up() -> None:
    problem, harms, rho = quadratic()
    report = Additivity.of(problem, Interactions.of(problem, "blocks"))
    assert report.units == pytest.approx(harms[:, 1].sum())
    assert report.pairs == pytest.approx(report.measured)  # a quadratic loss has no other terms
    assert report.measured == pytest.approx(loss(harms, rho, np.ones(UNITS, dtype=int)))
    sampler = AllocatorSampler(problem, allocator=Pairs())
    sampler.genomes(generation=0, parents=())
    assert sampler.facts()["additivity/measured"] == report.measured


def test_negative_eigenvalues_become_zero() -> None:
    matrix = np.array([[0.1, 0.5], [0.5, 0.1]])
    np.testing.assert_allclose(positive(matrix), np.full((2, 2), 0.3))


def test_an_unknown_grouping_is_refused() -> None:
    with pytest.raises(SettingError, match="group"):
        Pairs(group="layers")
