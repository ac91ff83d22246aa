import dataclasses
import itertools

import numpy as np
import pytest
import torch

from evosweep.allocators.alpha_pruning import AlphaPruning
from evosweep.allocators.dp import DP
from evosweep.allocators.greedy import Greedy
from evosweep.allocators.harm import AROUND_TOP, AROUND_UNIFORM, Harm
from evosweep.allocators.ilp import ILP
from evosweep.allocators.owl import OWL, snap
from evosweep.allocators.uniform import Uniform
from evosweep.core.errors import EvosweepError, SettingError, StoreError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.models.spectrum import hill_exponent
from evosweep.testing.problems import ladder, make_problem

ALL = [Uniform(), OWL(), AlphaPruning(), ILP(), ILP(harm="bare"), DP(), Greedy()]


@pytest.mark.parametrize("allocator", ALL, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("extra", [0, 77, 500])
def test_every_allocator_keeps_the_budget(allocator, extra: int) -> None:
    problem = make_problem(make_problem().least + extra)
    assert problem.feasible(allocator.allocate(problem))


def test_ilp_is_the_optimum_that_trying_everything_finds() -> None:
    rng = np.random.default_rng(0)
    units = tuple(
        Unit(f"u{n}", size, n, ladder(size), {"kl_per_error": float(rng.uniform(0.1, 5))})
        for n, size in enumerate((90, 100, 130, 170, 200, 240))
    )
    problem = Problem(units=units, budget=sum(unit.levels[1].cost for unit in units))

    def harm(genome: tuple[int, ...]) -> float:
        return sum(
            u.columns["kl_per_error"] * float(u.levels[g].error or 0) for u, g in zip(units, genome, strict=True)
        )

    feasible = (g for g in itertools.product(range(3), repeat=6) if problem.feasible(np.array(g)))
    assert harm(tuple(ILP(harm="scaled").allocate(problem))) == pytest.approx(min(map(harm, feasible)))


@pytest.mark.parametrize("seed", range(200))
def test_dp_finds_what_ilp_finds_and_greedy_comes_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = tuple(
        Unit(f"u{n}", size, n, ladder(size), {"kl_per_error": float(rng.uniform(0.1, 5))})
        for n, size in enumerate(rng.integers(50, 400, 30).tolist())
    )
    problem = Problem(units=units, budget=sum(unit.levels[1].cost for unit in units))
    harm = {
        type(each).__name__: float(Harm("scaled").table(problem)[np.arange(30), each.allocate(problem)].sum())
        for each in (kind(harm="scaled") for kind in (ILP, DP, Greedy))
    }
    assert harm["DP"] == pytest.approx(harm["ILP"], rel=1e-6)
    assert harm["ILP"] <= harm["Greedy"] + 1e-9 and harm["Greedy"] <= 1.2 * harm["ILP"]


def test_dp_says_how_many_states_it_would_take() -> None:
    problem = make_problem(make_problem().least + 500)
    with pytest.raises(SettingError, match=r"states must be at least \d+ .*ilp"):
        DP(states=1).check(problem)


def test_ilp_says_which_column_is_missing() -> None:
    units = tuple(Unit(u.name, u.numel, u.block, u.levels) for u in make_problem().units)
    with pytest.raises(StoreError, match="kl_per_error"):
        ILP(harm="scaled").allocate(Problem(units=units, budget=make_problem().budget))


class TestOWL:
    def test_a_multiple_that_no_store_has(self) -> None:
        with pytest.raises(SettingError, match=r"multiple must be one of 3, 5, 7, 10, got 4"):
            OWL(multiple=4)

    def test_targets_average_to_the_budget_and_stay_within_reach(self, problem: Problem) -> None:
        targets = OWL(spread=0.4).targets(problem)
        blocks = problem.numels.reshape(4, 3).sum(1)
        assert np.average(targets, weights=blocks) == pytest.approx(problem.budget / problem.numels.sum())
        assert np.ptp(targets) == pytest.approx(0.8)

    def test_blocks_with_more_outliers_get_more(self, problem: Problem) -> None:
        genome = OWL(spread=0.5).allocate(problem)
        spent = problem.costs[np.arange(12), genome].reshape(4, 3).sum(1)
        assert (np.diff(spent) >= 0).all() and spent[0] < spent[-1]

    def test_equal_blocks_get_the_uniform_allocation(self) -> None:
        problem = make_problem(outlier_ratio_m5=0.02)
        assert (OWL().allocate(problem) == problem.uniform()).all()

    def test_snap_meets_targets_that_are_levels(self, problem: Problem) -> None:
        wanted = np.repeat([0, 2, 1, 1], 3)
        costs = problem.costs[np.arange(12), wanted].reshape(4, 3).sum(1)
        exact = Problem(units=problem.units, budget=int(costs.sum()))
        targets = costs / problem.numels.reshape(4, 3).sum(1) + 1e-9
        assert (snap(exact, targets, priority=np.zeros(12)) == wanted).all()

    def test_within_a_block_outliers_go_first(self, problem: Problem) -> None:
        priority = np.array([1.0, 2.0, 0.0] * 4)
        raised_one = problem.costs[:3, 1].sum() + 100
        exact = Problem(units=problem.units, budget=int(problem.budget + 400))
        genome = snap(exact, np.full(4, raised_one / 500), priority=priority)
        assert (genome.reshape(4, 3) == [1, 2, 1]).all()

    def test_snap_survives_targets_below_the_ladder(self) -> None:
        problem = make_problem(make_problem().least)
        assert (snap(problem, np.full(4, 1e6), priority=np.zeros(12)) == 0).all()
        assert problem.feasible(snap(problem, np.array([-9.0, 9, 9, 9]), priority=np.zeros(12)))


class TestHarm:
    def measured(self, column: str, rises: np.ndarray) -> Problem:
        units = [
            dataclasses.replace(
                unit, columns={f"{column}/{each.name}": float(x) for each, x in zip(unit.levels, row, strict=True)}
            )
            for unit, row in zip(make_problem().units, rises, strict=True)
        ]
        return dataclasses.replace(make_problem(), units=tuple(units))

    @pytest.mark.parametrize("allocator", [ILP, DP])
    def test_it_is_read_at_every_level(self, allocator) -> None:
        rises = np.tile([5.0, 0.0, -1.0], (12, 1))
        rises[3] = [0.001, 0.0, 0.0]  # the one unit that can be lowered for next to nothing
        problem = self.measured(AROUND_UNIFORM, rises)
        genome = allocator(harm="around_uniform").allocate(problem)
        assert genome[3] == 0 and genome.sum() == 12 and problem.feasible(genome)

    def test_around_the_top_nothing_helps(self) -> None:
        table = Harm("around_top").table(self.measured(AROUND_TOP, np.tile([0.5, -0.2, 0.0], (12, 1))))
        assert table.tolist() == [[0.5, 1e-6, 1e-6]] * 12

    def test_bare_is_the_layer_error(self, problem: Problem) -> None:
        assert Harm("bare").table(problem)[0].tolist() == [level.error for level in problem.units[0].levels]
        assert ILP(harm="bare").columns == [] and ILP(harm="bare").name == "ilp_bare"

    def test_a_level_without_a_layer_error_is_named(self, problem: Problem) -> None:
        third = problem.units[2]
        unknown = dataclasses.replace(third.levels[1], error=None)
        units = list(problem.units)
        units[2] = dataclasses.replace(third, levels=(third.levels[0], unknown, third.levels[2]))
        message = f"; 1 have none \\({unknown.name} of {third.name} ...\\): store.layer_errors=true measures them"
        with pytest.raises(EvosweepError, match=message):
            ILP(harm="bare").allocate(dataclasses.replace(problem, units=tuple(units)))

    def test_what_only_drops_has_no_layer_error(self) -> None:
        units = tuple(Unit(f"u{n}", 10, n, (Level("drop", 0), Level("keep", 160))) for n in range(3))
        problem = Problem(units=units, budget=320)
        with pytest.raises(SettingError, match=r"harm must be one of around_top, around_uniform"):
            ILP(harm="scaled").check(problem)
        ILP(harm="around_top").check(problem)

    def test_a_kind_that_is_none(self) -> None:
        with pytest.raises(SettingError, match=r"harm must be one of .*did you mean 'scaled'"):
            Greedy(harm="scale")


def test_alpha_pruning_gives_heavy_tails_more() -> None:
    heavy = make_problem()
    units = tuple(dataclasses.replace(unit, columns={"hill_exponent": 2.0 + (unit.block != 2)}) for unit in heavy.units)
    problem = dataclasses.replace(heavy, units=units)
    spent = problem.costs[np.arange(12), AlphaPruning(spread=0.5).allocate(problem)].reshape(4, 3).sum(1)
    assert spent.argmax() == 2 and np.ptp(np.delete(spent, 2)) <= 100


@pytest.mark.parametrize("exponent", [1.5, 2.5, 4.0])
def test_the_hill_exponent_of_a_known_power_law(exponent: float) -> None:
    values = np.random.default_rng(0).pareto(exponent - 1, 800) + 1  # density ~ x^-exponent
    left, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(800, 800)))
    weight = torch.tensor(left * np.sqrt(values) @ left.T)
    assert hill_exponent(weight) == pytest.approx(exponent, rel=0.12)


def broken_problem(
    seed: int, *, units: int = 60, levels: int = 5, divisor: bool = True, broken: float = 0.3
) -> Problem:
    """Return units of which some have a harm of 1000 at one of their two lowest levels, among small ones."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(units):
        size = int(rng.integers(50, 400))
        costs = [size * (2 + k) + (0 if divisor else int(rng.integers(0, 40))) for k in range(levels)]
        harms = {f"{AROUND_TOP}/l{k}": 0.01 * float(rng.lognormal()) * 4.0**-k for k in range(levels)}
        if rng.random() < broken:
            harms[f"{AROUND_TOP}/l{int(rng.integers(0, 2))}"] = 1000.0
        made.append(Unit(f"u{n}", size, n, tuple(Level(f"l{k}", c) for k, c in enumerate(sorted(costs))), harms))
    widest = Problem(tuple(made), budget=10**9)
    share = rng.uniform(0.1, 0.9)
    return dataclasses.replace(widest, budget=int(widest.least + share * (widest.most - widest.least)))


def harm_of(problem: Problem, genome: np.ndarray) -> float:
    return float(Harm().table(problem)[np.arange(len(genome)), genome].sum())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("broken", [0.02, 0.3, 1.0])
def test_ilp_is_exact_where_some_harms_are_a_thousand(seed: int, broken: float) -> None:
    problem = broken_problem(seed, divisor=seed % 2 == 0, broken=broken)
    exact, found = DP().allocate(problem), ILP().allocate(problem)
    assert problem.feasible(found)
    assert harm_of(problem, found) == pytest.approx(harm_of(problem, exact), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_ilp_is_exact_whatever_the_scale_of_the_harm(scale: float) -> None:
    rng = np.random.default_rng(5)
    units = []
    for n in range(40):
        errors = scale * np.sort(rng.lognormal(size=4))[::-1]
        costs = np.cumsum(rng.integers(1, 60, 4)).tolist()
        levels = tuple(
            Level(f"l{k}", cost, error=float(error)) for k, (cost, error) in enumerate(zip(costs, errors, strict=True))
        )
        units.append(Unit(f"u{n}", 50, n, levels))
    problem = Problem(tuple(units), budget=3000)
    table = Harm("bare").table(problem)
    exact, found = (table[np.arange(40), kind(harm="bare").allocate(problem)].sum() for kind in (DP, ILP))
    assert found == pytest.approx(exact, rel=1e-10, abs=0)


def test_ilp_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A problem on which HiGHS prints a line of its own: costs without a common divisor."""
    rng = np.random.default_rng(79)
    units = []
    for n in range(60):
        size = int(rng.integers(10**5, 9 * 10**5))
        costs = sorted(size * (2 + k) + int(rng.integers(0, 40)) for k in range(7))
        harms = {f"{AROUND_TOP}/l{k}": float(rng.lognormal()) * 4.0**-k * 0.01 for k in range(7)}
        units.append(Unit(f"b.{n}.x", size, n, tuple(Level(f"l{k}", c) for k, c in enumerate(costs)), harms))
    least, most = (sum(unit.levels[end].cost for unit in units) for end in (0, -1))
    problem = Problem(tuple(units), budget=int(least + (most - least) * rng.uniform(0.2, 0.8)))
    assert problem.feasible(ILP().allocate(problem))
    assert capfd.readouterr().out == ""


def test_dp_takes_ladders_of_more_than_128_levels() -> None:
    levels = tuple(Level(f"l{k}", 10 + k) for k in range(300))
    harms = [{f"{AROUND_TOP}/l{k}": (n + 1.0) * (300 - k) for k in range(300)} for n in range(3)]
    units = tuple(Unit(f"u{n}", 10, n, levels, columns) for n, columns in enumerate(harms))
    problem = Problem(units, budget=30 + 299 + 200)  # the most harmful unit first, then the next
    assert DP().allocate(problem).tolist() == ILP().allocate(problem).tolist() == [0, 200, 299]


def test_dp_asks_whether_its_harm_applies() -> None:
    units = tuple(Unit(f"u{n}", 10, n, (Level("drop", 0), Level("keep", 160))) for n in range(3))
    with pytest.raises(SettingError, match=r"harm must be one of around_top, around_uniform") as raised:
        DP(harm="bare").check(Problem(units=units, budget=320))
    assert isinstance(raised.value.owner, DP)


SINGLE = tuple(
    dataclasses.replace(unit, levels=unit.levels[:1], columns={**unit.columns, "kl_around_uniform/2bit": 0.0})
    for unit in make_problem().units
)


@pytest.mark.parametrize(
    "allocator", [*ALL, ILP(harm="around_uniform"), DP(harm="around_uniform")], ids=lambda each: each.name
)
@pytest.mark.parametrize("extra", [0, 10**12])
def test_one_level_a_unit_is_the_only_allocation(allocator, extra: int) -> None:
    problem = Problem(SINGLE, budget=sum(unit.levels[0].cost for unit in SINGLE) + extra)
    allocator.check(problem)
    assert allocator.allocate(problem).tolist() == [0] * 12


@pytest.mark.parametrize("allocator", [OWL(), AlphaPruning()], ids=["owl", "alpha_pruning"])
def test_what_only_drops_has_no_weights_to_look_at(allocator) -> None:
    levels = (Level("dropped", 0, nominal=Nominal("kept", 0.0)), Level("kept", 160, nominal=Nominal("kept", 1.0)))
    problem = Problem(tuple(Unit(f"u{n}", 10, n, levels) for n in range(3)), budget=320)
    with pytest.raises(SettingError, match=r"block_influence.*compressor=none") as raised:
        allocator.check(problem)
    assert raised.value.owner is allocator
    allocator.check(make_problem())
