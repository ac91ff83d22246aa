from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evosweep.core.problem import Problem
from evosweep.search.combination import combined
from evosweep.search.effects import Measured, shrunk
from evosweep.search.move_survey import expected_regret
from evosweep.search.moves import random_feasible
from evosweep.search.moves_table import MoveTable, best_moves
from evosweep.testing.problems import make_problem
from tests.strategies import CHECKED, SEEDS, problems


class TestBestMoves:
    @CHECKED
    @given(problems(gates=False), SEEDS, st.sampled_from([1, 2, 4, None]))
    def test_they_are_within_one_move_of_the_best(self, problem: Problem, seed: int, changes: int | None) -> None:
        rng = np.random.default_rng(seed)
        table = MoveTable.around(problem, random_feasible(problem, rng))
        effects = rng.normal(size=len(table))
        slack = problem.budget - problem.cost(table.base)
        [choice] = best_moves(table, effects[None], slack=slack, changes=[changes])
        most = len(problem.units) if changes is None else changes
        assert problem.feasible(table.after(choice.moves)) and len(choice.moves) <= most
        assert len(set(table.units[choice.moves])) == len(choice.moves)
        options = [[-1, *np.flatnonzero(table.units == unit)] for unit in range(len(problem.units))]
        best = 0.0
        for picked in product(*options):
            moves = [move for move in picked if move >= 0]
            if len(moves) <= most and table.costs[moves].sum() <= slack:
                best = min(best, float(effects[moves].sum()))
        assert best - 1e-12 <= effects[choice.moves].sum() <= best + 2 * np.abs(effects).max(initial=0.0)

    @CHECKED
    @given(problems(), SEEDS)
    def test_combinations_fit_the_budget_even_where_units_gate_others(self, problem: Problem, seed: int) -> None:
        rng = np.random.default_rng(seed)
        table = MoveTable.around(problem, random_feasible(problem, rng))
        effects = rng.normal(size=(5, len(table)))
        for genome in combined(problem, table, effects, changes=[1, 2, 4, 8, None], seed=0, generation=1):
            assert problem.feasible(genome)

    def test_all_rows_are_solved_as_if_alone(self) -> None:
        problem = make_problem()
        table = MoveTable.around(problem, problem.uniform())
        effects = np.random.default_rng(0).normal(size=(6, len(table)))
        changes = [2, 4, None, 2, 4, None]
        together = best_moves(table, effects, slack=0, changes=changes)
        for row, choice in enumerate(together):
            [alone] = best_moves(table, effects[[row]], slack=0, changes=[changes[row]])
            assert alone.moves.tolist() == choice.moves.tolist()


class TestEstimates:
    def test_measured_means_are_paired_differences(self) -> None:
        rng = np.random.default_rng(0)
        base = rng.normal(size=(1, 30, 128))
        effects = np.array([0.5, -0.25])
        losses = np.concatenate([base, base + effects[:, None, None] + 0.1 * rng.normal(size=(2, 30, 128))])
        measured = Measured.none(4).adding(np.array([1, 3]), losses)
        means, variances = measured.means(np.zeros(4, dtype=int))
        assert means[[1, 3]] == pytest.approx(effects, abs=0.01)
        assert np.isinf(variances[[0, 2]]).all()
        assert variances[[1, 3]] == pytest.approx(0.01 / 3840 * 1.09, rel=0.4)

    def test_shrinking_lowers_the_error_and_knows_how_far_it_is_off(self) -> None:
        rng = np.random.default_rng(0)
        true = rng.normal(0.3, 0.2, size=8000)
        variances = np.where(np.arange(8000) % 2, 0.01, 0.25)
        means = true + np.sqrt(variances) * rng.normal(size=8000)
        found = shrunk(means, variances, np.zeros(8000, dtype=int), np.ones(8000, dtype=int))
        assert np.square(found.mean - true).mean() < 0.5 * np.square(means - true).mean()
        assert np.square(found.mean - true).mean() == pytest.approx(found.variance.mean(), rel=0.2)

    def test_larger_effects_that_are_noisier_keep_their_spread(self) -> None:
        rng = np.random.default_rng(0)
        true = rng.lognormal(0.0, 1.0, size=400)
        means = true + true * rng.normal(size=400)
        found = shrunk(means, true**2, np.zeros(400, dtype=int), np.ones(400, dtype=int))
        z = (found.mean - true) / np.sqrt(found.variance)
        assert np.square(z).mean() < 4  # weights by precision would make it some 20

    def test_moves_that_nothing_is_known_of_get_the_mean_of_their_group(self) -> None:
        means = np.array([1.0, 1.2, 0.8, 1.0, 0.0])
        variances = np.array([0.01, 0.01, 0.01, 0.01, np.inf])
        found = shrunk(means, variances, np.zeros(5, dtype=int), np.ones(5, dtype=int))
        assert found.mean[4] == pytest.approx(1.0) and found.variance[4] > found.variance[0]

    def test_regret_is_what_a_decision_by_the_mean_loses(self) -> None:
        draws = np.random.default_rng(0).normal(0.5, 2.0, size=400_000)
        expected = np.maximum(draws, 0).mean() - 0.5  # taken: 0.5; with the value known: its positive part
        assert expected_regret(np.array([0.5]), np.array([4.0]))[0] == pytest.approx(expected, rel=0.01)
