"""What holds for every problem: costs, moves, mutants and survivors, against trying everything."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError
from evosweep.core.genomes import genome_from_text, genome_to_text
from evosweep.core.problem import Genome, Problem
from evosweep.core.unit import Level, Unit
from evosweep.search import moves
from evosweep.search.block_groups import ENTROPY
from evosweep.search.mutation import FLIPS, GROUPS, TRIES, Flips
from evosweep.search.racing import Racing
from evosweep.search.survival import Race, ScoreAll
from tests.strategies import CHECKED, SEEDS, cost_by_hand, costs_of_all, problems, unit_tuples


class Counted(np.random.Generator):
    """A generator that counts how often it is asked."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self.draws = 0

    def integers(self, *args, **options):
        self.draws += 1
        return super().integers(*args, **options)

    def random(self, *args, **options):
        self.draws += 1
        return super().random(*args, **options)

    def permutation(self, *args, **options):
        self.draws += 1
        return super().permutation(*args, **options)


def genomes(problem: Problem) -> st.SearchStrategy[Genome]:
    return st.tuples(*(st.integers(0, int(size) - 1) for size in problem.sizes)).map(
        lambda levels: np.array(levels, dtype=np.int64)
    )


def is_genome(problem: Problem, genome: Genome) -> bool:
    return bool((genome >= 0).all() and (genome < problem.sizes).all() and genome.dtype == np.int64)


class TestProblem:
    @CHECKED
    @given(problems(), st.data())
    def test_costs_are_those_of_the_parts_that_are_there(self, problem: Problem, data: st.DataObject) -> None:
        genome = data.draw(genomes(problem))
        assert problem.cost(genome) == problem.prices(genome).sum() == cost_by_hand(problem, genome)
        assert problem.feasible(genome) == (cost_by_hand(problem, genome) <= problem.budget)
        assert (problem.encode(problem.decode(genome)) == genome).all()
        assert (genome_from_text(problem, genome_to_text(problem, genome)) == genome).all()
        assert 0 <= problem.sparsity(genome) <= 1

    @CHECKED
    @given(unit_tuples())
    def test_a_budget_is_refused_below_the_least_of_all_genomes_alone(self, units: tuple[Unit, ...]) -> None:
        widest = Problem(units, budget=10**9)
        assert (widest.least, widest.most) == (costs_of_all(widest).min(), costs_of_all(widest).max())
        Problem(units, budget=widest.least)
        with pytest.raises(BudgetError):
            Problem(units, budget=widest.least - 1)

    @CHECKED
    @given(problems())
    def test_uniform_is_the_highest_level_for_all_that_fits(self, problem: Problem) -> None:
        genome = problem.uniform()
        assert is_genome(problem, genome) and problem.feasible(genome)
        assert len({unit.level_names for unit in problem.units}) > 1 or len(set(genome.tolist())) == 1
        if len({unit.level_names for unit in problem.units}) == 1 and not problem.gated:
            same = [level for level in range(problem.sizes[0]) if problem.feasible(np.full_like(genome, level))]
            assert (genome == max(same)).all()

    @CHECKED
    @given(problems())
    def test_steps_lead_to_the_next_cost(self, problem: Problem) -> None:
        for unit, size in enumerate(problem.sizes):
            numbers = problem.plateaus[unit, :size]
            for level in range(size):
                above = [other for other in range(size) if numbers[other] > numbers[level]]
                below = [other for other in range(size) if numbers[other] < numbers[level]]
                assert problem.next_up[unit, level] == min(above, default=-1)
                assert problem.next_down[unit, level] == max(below, default=-1)

    @CHECKED
    @given(unit_tuples(gates=False), st.floats(0.01, 1.2), st.integers(0, 10**6))
    def test_a_budget_in_other_units_is_kept_and_its_hint_is_enough(
        self, units: tuple[Unit, ...], share: float, fixed: int
    ) -> None:
        widest = Problem(units, budget=10**9, fixed_bits=fixed)
        weights = int(widest.numels.sum())
        for kind, size in (("bits_per_weight", widest.most / weights), ("megabytes", (widest.most + fixed) / 8e6)):
            value = max(size * share, 1e-9)
            try:
                problem = Budget(**{kind: value}).problem(units, fixed_bits=fixed)
            except BudgetError as error:
                enough = float(str(error).split("at least ")[1].split()[0])
                problem = Budget(**{kind: max(enough, 1e-9)}).problem(units, fixed_bits=fixed)
                assert value < max(enough, 1e-9)
            assert widest.least <= problem.budget <= widest.most
            assert problem.feasible(problem.uniform())


class TestMoves:
    @CHECKED
    @given(problems(), st.data())
    def test_steps_are_differences_of_costs(self, problem: Problem, data: st.DataObject) -> None:
        genome = data.draw(genomes(problem))
        up = moves.steps_up(problem, genome)
        down = moves.steps_down(problem, genome)
        for unit in range(len(genome)):
            for steps, table, sign in ((up, problem.next_up, 1), (down, problem.next_down, -1)):
                moved = genome.copy()
                moved[unit] = table[unit, genome[unit]]
                if steps[unit] < 0:
                    assert moved[unit] == -1 or not problem.alive(genome)[unit]
                else:
                    assert sign * (cost_by_hand(problem, moved) - cost_by_hand(problem, genome)) == steps[unit]

    @CHECKED
    @given(problems(), SEEDS, st.data())
    def test_any_genome_is_repaired(self, problem: Problem, seed: int, data: st.DataObject) -> None:
        genome = data.draw(genomes(problem))
        before = genome.copy()
        rng = Counted(seed)
        assert moves.repair(problem, genome, rng)
        assert is_genome(problem, genome) and cost_by_hand(problem, genome) <= problem.budget
        assert rng.draws <= 2 * problem.total_levels
        assert (genome == before).all() == problem.feasible(before)

    @CHECKED
    @given(problems(), SEEDS, st.data())
    def test_a_kept_unit_stays_and_failure_means_that_nothing_fits(
        self, problem: Problem, seed: int, data: st.DataObject
    ) -> None:
        genome = data.draw(genomes(problem))
        kept = data.draw(st.integers(0, len(genome) - 1))
        before = genome.copy()
        held = moves.repair(problem, genome, Counted(seed), keep=(kept,))
        assert genome[kept] == before[kept] and held == problem.feasible(genome)
        below = np.zeros_like(genome)
        below[kept] = genome[kept]
        assert held == problem.feasible(below)

    @CHECKED
    @given(problems(), SEEDS)
    def test_a_random_genome_leaves_no_room(self, problem: Problem, seed: int) -> None:
        rng = Counted(seed)
        genome = moves.random_feasible(problem, rng)
        up = moves.steps_up(problem, genome)
        assert is_genome(problem, genome) and problem.feasible(genome)
        assert not ((up >= 0) & (up <= problem.budget - problem.cost(genome))).any()
        assert rng.draws <= 1 + 4 * problem.total_levels

    @CHECKED
    @given(problems(), SEEDS, st.sampled_from([moves.swap, moves.exchange, moves.sidestep]))
    def test_a_move_keeps_the_budget_and_says_whether_it_moved(self, problem: Problem, seed: int, move) -> None:
        genome = moves.random_feasible(problem, np.random.default_rng(seed))
        before = genome.copy()
        moved = move(problem, genome, Counted(seed))
        assert moved == (genome != before).any()
        assert is_genome(problem, genome) and cost_by_hand(problem, genome) <= problem.budget
        if move is moves.sidestep:
            assert cost_by_hand(problem, genome) == cost_by_hand(problem, before)


def can_move(problem: Problem, parent: Genome) -> bool:
    """Whether some unit can be raised if all others may be lowered, or moved among equal costs."""
    own = problem.plateaus[problem.indices, parent]
    if ((problem.plateaus == own[:, None]).sum(axis=1) > 1)[problem.alive(parent)].any():
        return True
    for unit in np.flatnonzero(moves.steps_up(problem, parent) >= 0):
        raised = np.zeros_like(parent)
        gate = problem.gate[unit]
        raised[unit] = problem.next_up[unit, parent[unit]]
        opened = raised.copy()
        opened[gate] = max(opened[gate], parent[gate])
        if problem.feasible(raised) or problem.feasible(opened):
            return True
    return False


def only_sidesteps() -> Problem:
    """Return a problem in which nothing can be raised, but one unit can move to a level of equal cost."""
    levels = (Level("l0", 0), Level("l1", 0), Level("l2", 1))
    return Problem((Unit("a", 1, 0, levels), Unit("b", 1, 0, levels)), budget=0)


class TestMutation:
    @CHECKED
    @example(only_sidesteps(), 163, {"max_flips": 1, "cross": 0.0, "flips": "min_of_two", "group": "size"})
    @given(
        problems(),
        SEEDS,
        st.builds(
            dict,
            max_flips=st.integers(1, 5),
            cross=st.sampled_from([0.0, 0.5, 1.0]),
            flips=st.sampled_from(FLIPS),
            group=st.sampled_from(GROUPS),
        ),
    )
    def test_a_mutant_fits_and_differs_wherever_a_move_exists(
        self, problem: Problem, seed: int, settings: dict
    ) -> None:
        entropies = [{ENTROPY: float(unit.block * 7 % 5)} for unit in problem.units]
        units = [replace(unit, columns=own) for unit, own in zip(problem.units, entropies, strict=True)]
        problem = replace(problem, units=tuple(units))
        parent = moves.random_feasible(problem, np.random.default_rng(seed))
        before = parent.copy()
        rng = Counted(seed)
        mutant = Flips(**settings)(problem, parent, rng)
        assert is_genome(problem, mutant) and cost_by_hand(problem, mutant) <= problem.budget
        assert (parent == before).all()
        assert (mutant != parent).any() == can_move(problem, parent)
        moves_at_most = 8 + 2 * len(parent) * (1 + 4 * problem.total_levels)
        assert rng.draws <= TRIES * (1 + settings["max_flips"] * moves_at_most)

    @CHECKED
    @given(problems(), SEEDS)
    def test_a_long_line_of_descent_stays_within_the_budget(self, problem: Problem, seed: int) -> None:
        genome = problem.uniform()
        for generation in range(8):
            genome = Flips()(problem, genome, np.random.default_rng([seed, generation]))
            assert is_genome(problem, genome) and problem.feasible(genome)


class Recorded:
    """Losses that are known beforehand, read by the first unit's level."""

    def __init__(self, losses: np.ndarray) -> None:
        self.table = losses
        self.seq_len = losses.shape[2] + 1
        self.tokens = 0

    def score(self, genomes, *, generation: int, stage: int, tokens: int) -> np.ndarray:
        self.tokens += tokens * len(genomes)
        return self.table[genomes[:, 0], : tokens // self.seq_len].mean(axis=(1, 2), dtype=np.float64)

    def losses(self, genomes, *, generation: int, stage: int, tokens: int, windows: slice, length: int) -> np.ndarray:
        self.tokens += length * (windows.stop - windows.start) * len(genomes)
        return self.table[genomes[:, 0], windows, : length - 1]

    def reduce(self, loss: float) -> float:
        return loss


class TestSurvival:
    @CHECKED
    @example(0, 6, 5, 1, 2048, 0.0, 0.0, 0.2)  # all tie, with one place too few
    @given(
        SEEDS,
        st.integers(1, 12),
        st.integers(1, 12),
        st.integers(1, 5),
        st.sampled_from([64, 320, 2048]),
        st.sampled_from([0.0, 1e-6, 1.0]),
        st.sampled_from([0.0, 0.3]),
        st.sampled_from([0.01, 0.2, 0.5]),
    )
    def test_a_race_leaves_the_survivors_and_ends(
        self,
        seed: int,
        candidates: int,
        survivors: int,
        windows: int,
        seq_len: int,
        apart: float,
        noise: float,
        error: float,
    ) -> None:
        rng = np.random.default_rng(seed)
        shifts = apart * rng.permutation(candidates)
        table = (rng.gamma(2.0, 1.0, (1, windows, seq_len - 1)) + shifts[:, None, None]).astype(np.float32)
        table += (noise * rng.standard_normal(table.shape)).astype(np.float32)
        tokens = windows * seq_len
        asked = {"generation": 1, "stage": 0, "tokens": tokens, "survivors": survivors}
        genomes = np.arange(candidates)[:, None]
        scorer = Recorded(table)
        race = Race(Racing(error)).run(genomes, scorer=scorer, **asked)
        whole = ScoreAll().run(genomes, scorer=Recorded(table), **asked)
        assert race.tokens == scorer.tokens <= whole.tokens + candidates * seq_len // 4
        assert whole.tokens == tokens * candidates and not whole.given_up.any()
        assert sorted(race.order()) == sorted(whole.order()) == list(range(candidates))
        assert (~race.given_up).sum() >= min(survivors, candidates) and np.isfinite(race.scores).all()
        order = whole.order()
        assert (np.diff(whole.scores[order]) >= 0).all()
        if apart == 1.0 and not noise:
            count = min(survivors, candidates)
            assert set(race.order()[:count]) == set(order[:count])
