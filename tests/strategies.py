"""Small problems for property tests: few enough genomes that each of them can be tried."""

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from evosweep.core.problem import Genome, Problem
from evosweep.core.unit import Level, Nominal, Unit

CHECKED = settings(
    derandomize=True, deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow], database=None
)
MOST_GENOMES = 3000
STEPS = st.sampled_from([0, 0, 1, 7, 10, 10, 31, 1000])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def ladders(draw: st.DrawFn, *, bottom: int | None = None) -> tuple[Level, ...]:
    """One to four levels by rising cost, some at the same cost; a single level is a unit that is fixed."""
    least = draw(st.integers(0, 40)) if bottom is None else bottom
    costs = least + np.cumsum([0, *draw(st.lists(STEPS, max_size=3))])
    return tuple(Level(f"l{n}", int(cost), nominal=Nominal("bits", float(n))) for n, cost in enumerate(costs))


@st.composite
def unit_tuples(draw: st.DrawFn, *, gates: bool | None = None, columns: bool = False) -> tuple[Unit, ...]:
    """Up to six units in blocks; where ``gates``, some of them can be dropped with all that is inside."""
    gated = draw(st.booleans()) if gates is None else gates
    units: list[Unit] = []
    count = 1
    for block in range(draw(st.integers(1, 3))):
        inside = []
        for name in "ab"[: draw(st.integers(1, 2))]:
            levels = draw(ladders())
            inside.append(Unit(f"m.{block}.{name}", draw(st.integers(1, 50)), block, levels))
        if gated and draw(st.booleans()):
            own = (Level("dropped", 0, removed=1.0), Level("kept", draw(st.sampled_from([0, 5, 31]))))
            inside.insert(0, Unit(f"m.{block}", 1, block, own, gates=tuple(unit.name for unit in inside)))
        count *= int(np.prod([len(unit.levels) for unit in inside]))
        if count > MOST_GENOMES:
            break
        units += inside
    if not columns:
        return tuple(units)
    return tuple(replace(unit, columns=draw(harms(unit))) if not unit.gates else unit for unit in units)


@st.composite
def harms(draw: st.DrawFn, unit: Unit) -> dict[str, float]:
    """What every level of a unit does to the model: alike, far apart, not falling, or one that breaks it."""
    values = st.one_of(st.sampled_from([0.0, 1.0, 1.0, 1e-9, 1000.0]), st.floats(0, 5, allow_subnormal=False, width=32))
    return {f"kl_around_top/{level.name}": float(draw(values)) for level in unit.levels}


@st.composite
def problems(draw: st.DrawFn, *, gates: bool | None = None, columns: bool = False) -> Problem:
    """A problem whose budget lies anywhere from the least to more than the most."""
    widest = Problem(draw(unit_tuples(gates=gates, columns=columns)), budget=10**9)
    budget = draw(st.one_of(st.sampled_from([widest.least, widest.most]), st.integers(widest.least, widest.most + 9)))
    return replace(widest, budget=int(budget))


def every_genome(problem: Problem) -> np.ndarray:
    """Return all genomes, shape (genomes, units)."""
    return np.indices(tuple(problem.sizes)).reshape(len(problem.units), -1).T


def cost_by_hand(problem: Problem, genome: Genome) -> int:
    """Return what a genome costs, unit by unit, as the documentation of units and gates says."""
    dropped = {
        name
        for unit, level in zip(problem.units, genome, strict=True)
        if unit.gates and level == 0
        for name in unit.gates
    }
    pairs = zip(problem.units, genome, strict=True)
    return sum(unit.levels[level].cost for unit, level in pairs if unit.name not in dropped)


def costs_of_all(problem: Problem) -> np.ndarray:
    """Return the costs of all genomes, shape (genomes,)."""
    return np.array([cost_by_hand(problem, genome) for genome in every_genome(problem)])
