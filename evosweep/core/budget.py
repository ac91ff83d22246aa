"""Budgets in several units; a problem's budget is always a number of bits for its units."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evosweep.core.checks import check_choice, check_number
from evosweep.core.errors import BudgetError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.second_budget import Second
from evosweep.core.unit import Unit

LARGEST = 2.0**62  # bits; a larger budget binds nothing
KINDS = ("as_uniform", "bits_per_weight", "megabytes", "sparsity", "blocks_kept")
UNBOUNDED = ""  # kind of a budget that bounds the device or time alone
ALL = "all"
COUNTS = (ALL, "active")
MOST = 1e12  # bits per weight or megabytes: beyond anything that exists


class Budget:
    """A bound on size, given in one of several ways.

    Args:
        as_uniform: What every unit at this level costs: a level's name (``3bit``, ``Q4_K``) or its nominal number
            (``3``, ``4.5``).
        bits_per_weight: True bits (codes, scales, zeros) over the weights of the units.
        megabytes: 10⁶ bytes of the whole model: units, and everything else at its own width.
        sparsity: What every unit costs with this share of its weights removed, masks included.
        blocks_kept: This share of what all units cost, where they can be dropped.
        count: Whether ``all`` weights of a mixture of experts count, or only those that are ``active`` for one token:
            the share of the experts that each token goes to. Bits per weight and megabytes are then of those.
        device_megabytes: 10⁶ bytes on the device, beside a bound on the whole or alone: everything that is no unit, and
            the units of ``on_device``; the other units are in host memory.
        on_device: Patterns of the units that are on the device, as in rules; None: all but experts of mixtures.
        milliseconds: What the kernels of all units take together, beside a bound on size or alone; levels know it by
            ``objective.latency``.
        others: Of several budgets: tokens of all searches but the first together, over those of the first.

    Raises:
        SettingError: Not exactly one bound on size is given (none, where one on the device or on time is), or a value
            is out of range.
    """

    def __init__(
        self,
        *,
        as_uniform: int | float | str | None = None,
        bits_per_weight: float | None = None,
        megabytes: float | None = None,
        sparsity: float | None = None,
        blocks_kept: float | None = None,
        device_megabytes: float | None = None,
        on_device: Sequence[str] | None = None,
        milliseconds: float | None = None,
        others: float = 0.3,
        count: str = ALL,
    ) -> None:
        self.count = check_choice("count", count, COUNTS)
        self.others = check_number("others", others, low=0)
        values = {
            "as_uniform": as_uniform,
            "bits_per_weight": bits_per_weight,
            "megabytes": megabytes,
            "sparsity": sparsity,
            "blocks_kept": blocks_kept,
        }
        given = {kind: value for kind, value in values.items() if value is not None}
        self.second = Second(device_megabytes=device_megabytes, on_device=on_device, milliseconds=milliseconds)
        if self.second.device_megabytes is not None and self.count != ALL:
            raise SettingError("device_megabytes", allowed="null with budget.count=active", got=device_megabytes)
        if not given and self.second:
            given = {UNBOUNDED: math.inf}
        if len(given) != 1:
            raise SettingError(
                "",
                owner=self,
                allowed=f"exactly one of {', '.join(KINDS)}",
                got=given or None,
                hint=f"the others are null, as in budget.{list(given)[-1]}=null" if len(given) > 1 else "",
            )
        ((self.kind, self.value),) = given.items()
        if self.kind not in ("as_uniform", UNBOUNDED):
            high = 1 if self.kind in ("sparsity", "blocks_kept") else MOST
            self.value = check_number(f"{self.kind}", self.value, low=0, high=high, exclusive=True)

    def __str__(self) -> str:
        first = f"{self.kind}={self.value:g}" if isinstance(self.value, float) else f"{self.kind}={self.value}"
        return " ".join(text for text in ("" if self.kind == UNBOUNDED else first, str(self.second)) if text)

    def problem(self, units: Sequence[Unit], *, fixed_bits: int = 0, planned: Sequence[Unit] | None = None) -> Problem:
        """Return the problem of these units under this budget.

        Args:
            units: Units with the levels that the store has.
            fixed_bits: Bits of everything that belongs to no unit.
            planned: The same units with all levels that the budget may name, where the store left some out.

        Raises:
            BudgetError: The budget is below the smallest that the levels allow; the message gives the range.
            SettingError: ``as_uniform`` names a level that some unit lacks.
        """
        widest = _widest(self._counted(units), fixed_bits)
        try:
            bits = self._bits(widest if planned is None else _widest(self._counted(planned), fixed_bits))
        except SettingError as error:
            error.owner = self
            raise
        if bits < widest.least:
            raise BudgetError(
                f"budget.{self.kind} must be at least {self._at_least(widest, widest.least)} here "
                f"(the most that these levels can use is {self._at_least(widest, widest.most)}), got {self.value}"
            )
        problem = replace(widest, budget=min(bits, widest.most))
        return self.second.applied(problem, owner=self)

    def note(self, problem: Problem) -> str | None:
        """Return a sentence for the user if the budget is more than this problem can spend; None if it is not.

        Args:
            problem: As ``problem`` made it.
        """
        if self.kind not in ("bits_per_weight", "megabytes") or self._bits(problem) <= problem.most:
            return None
        return (
            f"budget.{self.kind}={self.value:g} is more than the largest levels use "
            f"({self._at_least(problem, problem.most)}): every unit can take its largest level"
        )

    def _counted(self, units: Sequence[Unit]) -> Sequence[Unit]:
        return units if self.count == ALL else [unit.active for unit in units]

    def _bits(self, problem: Problem) -> int:
        if self.kind == UNBOUNDED:
            return problem.most
        if self.kind == "bits_per_weight":
            return _whole(float(self.value) * int(problem.numels.sum()))
        if self.kind == "megabytes":
            return _whole(float(self.value) * 8e6) - problem.fixed_bits
        if self.kind == "blocks_kept":
            return kept_cost(problem, float(self.value))
        if self.kind == "sparsity":
            return sum(
                unit.levels[-1].cost if unit.gates or unit.outer else sparse_cost(unit, float(self.value))
                for unit in problem.units
            )
        inner = [unit for unit in problem.units if not unit.gates and not unit.outer]
        bits = sum(uniform_level_cost(unit, self.value) for unit in inner)
        bits += sum(unit.levels[-1].cost for unit in problem.units if unit.gates)
        wanted = self._nominal(inner)
        return bits + sum(nearest_level_cost(unit, wanted) for unit in problem.units if unit.outer)

    def _nominal(self, units: Sequence[Unit]) -> float:
        """Return the nominal number of the level that ``as_uniform`` names in units; infinite where it has none."""
        named = (level for unit in units for level in unit.levels if level.name == str(self.value))
        level = next(named, None)
        if level is not None and level.nominal is not None:
            return level.nominal.number
        return float(self.value) if isinstance(self.value, int | float) else math.inf

    def _at_least(self, problem: Problem, bits: int) -> str:
        """Return a number of bits as users write budgets, rounded up so that what is printed is enough."""
        if self.kind == "megabytes":
            return f"{-(-(bits + problem.fixed_bits) // 8000) / 1000:.3f} MB"
        return f"{-(-bits * 10_000 // int(problem.numels.sum())) / 10_000:.4f} bits per weight"


def _whole(bits: float) -> int:
    """Return the whole bits within a budget; a number too large for any model is cut down to a very large one."""
    return math.floor(min(bits, LARGEST) + 1e-6)


def _widest(units: Sequence[Unit], fixed_bits: int) -> Problem:
    return Problem(units=tuple(units), budget=sum(unit.levels[-1].cost for unit in units), fixed_bits=fixed_bits)


def kept_cost(problem: Problem, kept: float) -> int:
    """Return this share of what the dearest allocation costs.

    Raises:
        SettingError: Nothing can be dropped.
    """
    if problem.least:
        raise SettingError(
            "blocks_kept", allowed="used where everything can be dropped (drop=blocks and the like)", got=kept
        )
    return math.floor(kept * problem.most + 1e-6)


def uniform_level_cost(unit: Unit, wanted: int | float | str) -> int:
    """Return the cost of a unit's level called ``wanted`` or with that nominal number.

    Raises:
        SettingError: The unit has no such level.
    """
    for level in unit.levels:
        number = None if level.nominal is None else level.nominal.number
        if level.name == str(wanted) or (isinstance(wanted, int | float) and number == wanted):
            return level.cost
    raise SettingError(
        "as_uniform",
        allowed=[v.name if v.nominal is None else f"{v.nominal.number:g}" for v in unit.levels],
        got=wanted,
        hint=f"these are the levels of {unit.name}",
    )


def nearest_level_cost(unit: Unit, wanted: float) -> int:
    """Return the cost of the level of a unit outside of the blocks that is nearest to a nominal number."""
    numbered = [level for level in unit.levels if level.nominal is not None and math.isfinite(wanted)]
    if not numbered:
        return unit.levels[-1].cost
    return min(numbered, key=lambda level: abs(level.nominal.number - wanted) if level.nominal else math.inf).cost


def sparse_cost(unit: Unit, sparsity: float) -> int:
    """Return what a unit costs at a sparsity, interpolated between its levels.

    Raises:
        SettingError: Its levels are no sparsities, or do not reach this one.
    """
    values = [level.nominal.number for level in unit.levels if level.nominal and level.nominal.kind == "sparsity"]
    if len(values) != len(unit.levels) or values != sorted(values, reverse=True):
        raise SettingError("sparsity", allowed="used with sparse levels (compressor=sparsegpt)", got=sparsity)
    if not values[-1] - 1e-9 <= sparsity <= values[0] + 1e-9:
        reach = f"from {values[-1]:.4g} to {values[0]:.4g}, the levels of {unit.name} (see compressor.window)"
        raise SettingError("sparsity", got=sparsity, allowed=reach)
    return math.floor(np.interp(sparsity, values[::-1], [level.cost for level in unit.levels][::-1]) + 1e-6)
