import numpy as np
import pytest

from evosweep.allocators.inter_layer import InterLayer, augmented, bounded
from evosweep.allocators.interactions import Interactions
from evosweep.core.errors import StoreError
from evosweep.testing.problems import make_problem
from tests.allocators.test_pairs import UNITS, loss, quadratic


def test_sensitivities_at_the_uniform_allocation_add_up_to_its_harm() -> None:
    problem, harms, rho = quadratic()
    uniform = problem.uniform()
    table = augmented(harms, np.arange(UNITS) // 2, rho, uniform)
    assert table[np.arange(UNITS), uniform].sum() == pytest.approx(loss(harms, rho, uniform))
    unit = 3
    slow = harms[unit, 0] + sum(
        rho[unit // 2, other // 2] * (harms[unit, 0] * harms[other, 1]) ** 0.5
        for other in range(UNITS)
        if other != unit
    )
    assert table[unit, 0] == pytest.approx(max(slow, 0.0))


def test_the_bound_is_the_lowest_that_fits() -> None:
    problem = make_problem()
    table = np.array([[float(level.error or 0) for level in unit.levels] for unit in problem.units])
    genome = bounded(problem, table)
    assert problem.feasible(genome)
    worst = table[problem.indices, genome].max()
    for bound in np.unique(table[table < worst]):
        lower = (table <= bound).argmax(axis=1)
        assert not ((table <= bound).any(axis=1).all() and problem.feasible(lower))


def test_what_is_left_of_the_budget_is_spent() -> None:
    problem, _, _ = quadratic()
    genome = InterLayer(harm="around_top").allocate(problem)
    left = problem.budget - problem.cost(genome)
    raises = problem.rises[problem.indices, genome]
    model = Interactions.of(problem, "blocks")
    table = augmented(model.harms, model.groups, model.matrix, problem.uniform())
    gains = [table[u, genome[u]] - table[u, genome[u] + 1] for u in np.flatnonzero((raises >= 0) & (raises <= left))]
    assert left >= 0 and max(gains, default=0.0) <= 0.0


def test_columns_that_were_not_measured_are_missed() -> None:
    with pytest.raises(StoreError, match="kl_pairs_blocks"):
        InterLayer(harm="around_top").allocate(make_problem())
