import numpy as np
import pytest

from evosweep.core.allocation import Allocation
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError, EvosweepError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.testing.problems import ladder, make_problem


def test_cost_is_the_sum_of_the_chosen_levels(problem: Problem) -> None:
    genome = np.arange(12) % 3
    expected = sum(unit.levels[level].cost for unit, level in zip(problem.units, genome, strict=True))
    assert problem.cost(genome) == expected


def test_megabytes_counts_what_is_not_compressed(problem: Problem) -> None:
    assert problem.megabytes(7200) == pytest.approx((7200 + 800) / 8e6)


def test_decode_then_encode_is_the_same_genome(problem: Problem) -> None:
    genome = np.arange(12) % 3
    assert (problem.encode(problem.decode(genome)) == genome).all()


def test_encode_names_the_nearest_unit(problem: Problem) -> None:
    wrong = dict(problem.decode(problem.uniform()))
    wrong["blocks.0.linear_00"] = wrong.pop("blocks.0.linear_0")
    with pytest.raises(EvosweepError, match=r"did you mean 'blocks\.0\.linear_0'"):
        problem.encode(wrong)


def test_uniform_is_the_highest_shared_level_within_the_budget() -> None:
    assert (make_problem().uniform() == 1).all()
    assert (make_problem(make_problem().budget - 1).uniform() == 0).all()
    assert (make_problem(make_problem().most).uniform() == 2).all()


def test_problem_rejects_ladders_that_do_not_rise() -> None:
    levels = ladder(10)
    with pytest.raises(SettingError, match="rising cost"):
        Problem(units=(Unit("a", 10, 0, levels[::-1]),), budget=1000)


def test_what_is_removed_counts_weights_and_what_is_dropped_whole() -> None:
    half, whole = Level("50%", 10, removed=0.5), Level("dense", 20)
    inside = tuple(Unit(f"b.0.{name}", 100, 0, (half, whole)) for name in "ab")
    gate = Unit("b.0.mlp", 40, 0, (Level("dropped", 0, removed=1.0), Level("kept", 5)), gates=("b.0.b",))
    problem = Problem(units=(*inside, gate), budget=45)
    assert problem.sparsity(np.array([1, 1, 1])) == 0
    assert problem.sparsity(np.array([0, 1, 1])) == pytest.approx(50 / 240)
    assert problem.sparsity(np.array([0, 1, 0])) == pytest.approx(190 / 240)


def test_fingerprint_changes_with_budget_only_when_it_should() -> None:
    assert make_problem().fingerprint == make_problem(kl_per_error=3.0).fingerprint
    assert make_problem().fingerprint != make_problem(make_problem().budget - 1).fingerprint


def test_allocation_round_trips_through_json(tmp_path, problem: Problem) -> None:
    allocation = problem.decode(problem.uniform())
    path = allocation.save(tmp_path / "allocation.json", note=1)
    again = Allocation.load(path)
    assert again == allocation and hash(again) == hash(allocation) and again.hash == allocation.hash


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"allocation": 3}'])
def test_allocation_file_that_is_none_says_so(tmp_path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(EvosweepError, match=r"not an allocation\.json"):
        Allocation.load(path)


class TestBudget:
    units = make_problem().units

    def test_three_ways_to_say_one_budget(self) -> None:
        bits = make_problem().budget
        weights = sum(unit.numel for unit in self.units)
        for budget in (
            Budget(as_uniform=3),
            Budget(as_uniform="3bit"),
            Budget(bits_per_weight=bits / weights),
            Budget(megabytes=(bits + 800) / 8e6),
        ):
            assert budget.problem(self.units, fixed_bits=800).budget == bits

    def test_too_small_names_least_and_most(self) -> None:
        problem = make_problem()
        least, most = (problem.bits_per_weight(bits) for bits in (problem.least, problem.most))
        with pytest.raises(BudgetError, match=f"{least:.4f} bits per weight .*{most:.4f} bits per weight"):
            Budget(bits_per_weight=1.0).problem(self.units)

    def test_level_that_no_unit_has(self) -> None:
        with pytest.raises(SettingError, match=r"as_uniform must be one of 2, 3, 4, got 7"):
            Budget(as_uniform=7).problem(self.units)

    @pytest.mark.parametrize("values", [{}, {"as_uniform": 3, "megabytes": 1.0}])
    def test_exactly_one_way(self, values: dict) -> None:
        with pytest.raises(SettingError, match="exactly one"):
            Budget(**values)

    @pytest.mark.parametrize("value", [0, -1, float("nan"), "three", True])
    def test_bits_per_weight_out_of_range(self, value: object) -> None:
        with pytest.raises(SettingError, match=r"bits_per_weight"):
            Budget(bits_per_weight=value)  # type: ignore[arg-type]

    def test_sparsity_is_what_every_unit_costs_at_it(self) -> None:
        ladder = tuple(
            Level(f"{100 * (1 - k / 100):g}%", cost=100 + 16 * k, nominal=Nominal("sparsity", 1 - k / 100))
            for k in (25, 50, 75)
        )
        units = tuple(Unit(name, 100, 0, ladder) for name in "ab")
        assert Budget(sparsity=0.5).problem(units).budget == 2 * (100 + 16 * 50)
        assert Budget(sparsity=0.375).problem(units).budget == 2 * (100 + 16 * 62.5)
        with pytest.raises(SettingError, match=r"sparsity must be from 0\.25 to 0\.75"):
            Budget(sparsity=0.9).problem(units)

    def test_sparsity_of_bit_widths_makes_no_sense(self) -> None:
        with pytest.raises(SettingError, match="sparse levels"):
            Budget(sparsity=0.5).problem(self.units)


def test_uniform_means_one_cost_per_weight_where_ladders_differ() -> None:
    small = Unit(
        "s", 100, 0, tuple(Level(str(k), cost=16 * k, nominal=Nominal("sparsity", 1 - k / 100)) for k in (25, 50, 75))
    )
    large = Unit(
        "l",
        400,
        0,
        tuple(Level(str(k), cost=16 * k, nominal=Nominal("sparsity", 1 - k / 400)) for k in range(100, 325, 25)),
    )
    half = Problem(units=(small, large), budget=16 * 250)
    assert dict(half.decode(half.uniform())) == {"s": "50", "l": "200"}


class TestBudgetsAtTheirEnds:
    units = make_problem().units

    @pytest.mark.parametrize(("kind", "unit"), [("bits_per_weight", "bits per weight"), ("megabytes", "MB")])
    @pytest.mark.parametrize("odd", range(7))
    def test_the_least_that_an_error_prints_is_enough(self, kind: str, unit: str, odd: int) -> None:
        units = (*self.units, Unit("odd", 7 * odd + 1, 9, (Level("a", 13 * odd + 1), Level("b", 50 * odd + 60))))
        with pytest.raises(BudgetError, match=rf"must be at least [\d.]+ {unit}") as raised:
            Budget(**{kind: 1e-9}).problem(units, fixed_bits=801)
        printed = float(str(raised.value).split("at least ")[1].split()[0])
        assert Budget(**{kind: printed}).problem(units, fixed_bits=801).budget >= Problem(units, budget=10**9).least

    @pytest.mark.parametrize("kind", ["bits_per_weight", "megabytes"])
    @pytest.mark.parametrize("value", [1e12, 100.0])
    def test_a_budget_above_the_largest_levels_is_said(self, kind: str, value: float) -> None:
        budget = Budget(**{kind: value})
        problem = budget.problem(self.units, fixed_bits=800)
        assert problem.budget == problem.most
        note = budget.note(problem)
        assert note is not None and f"budget.{kind}={value:g} is more than the largest levels use" in note

    @pytest.mark.parametrize("kind", ["bits_per_weight", "megabytes"])
    @pytest.mark.parametrize("value", [1e308, 1e30])
    def test_a_budget_of_any_size_is_refused(self, kind: str, value: float) -> None:
        with pytest.raises(SettingError, match=rf"^{kind} must be a number above 0 and at most 1000000000000"):
            Budget(**{kind: value})

    def test_a_budget_that_can_be_spent_has_no_note(self) -> None:
        for budget in (Budget(as_uniform=4), Budget(as_uniform=3), Budget(bits_per_weight=3.1)):
            assert budget.note(budget.problem(self.units)) is None


def test_steps_go_to_the_next_distinct_cost() -> None:
    costs = (5, 5, 8, 8, 8, 9)
    problem = Problem((Unit("a", 1, 0, tuple(Level(f"l{n}", c) for n, c in enumerate(costs))),), budget=9)
    assert problem.next_up.tolist() == [[2, 2, 5, 5, 5, -1]]
    assert problem.next_down.tolist() == [[-1, -1, 1, 1, 1, 4]]
    assert problem.rises.tolist() == [[3, 3, 1, 1, 1, -1]]
    assert problem.falls.tolist() == [[-1, -1, 3, 3, 3, 1]]
    assert problem.has_equal_costs and not make_problem().has_equal_costs
