"""Small problems without a model: what a test of samplers and allocators needs."""

from dataclasses import replace

from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit


def ladder(numel: int, bits: tuple[int, ...] = (2, 3, 4)) -> tuple[Level, ...]:
    """Return one level a bit-width, for a unit of ``numel`` weights; errors fall by 4 with every bit."""
    return tuple(
        Level(
            f"{width}bit",
            cost=numel * width + 19,
            error=numel * 4.0**-width,
            relative_error=4.0**-width,
            nominal=Nominal("bits", float(width)),
        )
        for width in bits
    )


def make_problem(budget: int | None = None, **columns: float) -> Problem:
    """Return a problem of twelve units of two sizes in four blocks, each with 2, 3 and 4 bits.

    Args:
        budget: In bits; None: what 3 bits for every unit cost.
        columns: Columns of every unit, besides those that evosweep's allocators read.
    """
    units = tuple(
        Unit(
            f"blocks.{n // 3}.linear_{n % 3}",
            numel,
            n // 3,
            ladder(numel),
            {
                "outlier_ratio_m5": 0.01 * (n // 3),
                "kl_per_error": 1.0 + n,
                "hill_exponent": 3.0 - 0.1 * n,
                **{f"kl_around_top/{level.name}": (1.0 + n) * float(level.error or 0) for level in ladder(numel)},
                **columns,
            },
        )
        for n, numel in enumerate((100, 100, 300) * 4)
    )
    bits = sum(unit.levels[1].cost for unit in units) if budget is None else budget
    return Problem(units=units, budget=bits, fixed_bits=800)


def unfilled_problem() -> Problem:
    """Return a problem whose budget is not what one level for all units costs."""
    return make_problem(make_problem().budget + 450)


def equal_costs(share: float) -> Problem:
    """Return a problem whose levels cost the same two by two, as 50 % and 2:4 sparsity do.

    Args:
        share: Budget, as a share of the way from the cheapest allocation (0) to the dearest (1).
    """
    units = []
    for unit in make_problem().units:
        levels = tuple(Level(f"l{n}", unit.numel * bits + 19) for n, bits in enumerate((2, 2, 4, 4)))
        harms = {f"kl_around_top/{level.name}": 1.0 / (1 + n) for n, level in enumerate(levels)}
        units.append(Unit(unit.name, unit.numel, unit.block, levels, {**unit.columns, **harms}))
    widest = Problem(tuple(units), budget=10**6)
    return replace(widest, budget=int(widest.least + share * (widest.most - widest.least)))
