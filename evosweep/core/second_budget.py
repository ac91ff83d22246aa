"""Bounds beside a problem's size: megabytes on the device, milliseconds of kernels."""

from collections.abc import Sequence
from dataclasses import replace

from evosweep.core.checks import check_number
from evosweep.core.errors import BudgetError, SettingError
from evosweep.core.latency import MILLISECONDS, NANOSECONDS, latencies
from evosweep.core.limits import Limit, least_within_budget
from evosweep.core.problem import Problem
from evosweep.core.rules import matched
from evosweep.core.unit import ACTIVE_SHARE, Unit

DEVICE = "device_megabytes"
MOST = 1e12
SHOWN = {DEVICE: "MB", MILLISECONDS: "ms"}


class Second:
    """The bounds of a budget that are not on its size; ``core.budget.Budget`` explains them.

    Args:
        device_megabytes: 10⁶ bytes on the device.
        on_device: Patterns of units that are there; None: all but experts.
        milliseconds: Of the kernels of all units.

    Raises:
        SettingError: A value is out of range.
    """

    def __init__(
        self, *, device_megabytes: float | None, on_device: Sequence[str] | None, milliseconds: float | None
    ) -> None:
        self.device_megabytes = _positive(DEVICE, device_megabytes)
        self.milliseconds = _positive(MILLISECONDS, milliseconds)
        if on_device is not None and (isinstance(on_device, str) or not isinstance(on_device, Sequence)):
            raise SettingError("on_device", allowed="a list of patterns, or null", got=on_device)
        self.on_device = None if on_device is None else [str(pattern) for pattern in on_device]
        if self.on_device is not None and self.device_megabytes is None:
            raise SettingError("on_device", allowed="null without budget.device_megabytes", got=self.on_device)

    def __bool__(self) -> bool:
        return self.device_megabytes is not None or self.milliseconds is not None

    def __str__(self) -> str:
        values = {DEVICE: self.device_megabytes, MILLISECONDS: self.milliseconds}
        return " ".join(f"{name}={value:g}" for name, value in values.items() if value is not None)

    def applied(self, problem: Problem, *, owner: object) -> Problem:
        """Return a problem with these bounds, for which some allocation holds all of them.

        Args:
            problem: Units and the bound on size.
            owner: The budget, for messages.

        Raises:
            BudgetError: Nothing holds a bound within the size; the message says what is reachable.
            SettingError: A pattern matches nothing, a level has no known time, or units can be dropped.
        """
        if not self:
            return problem
        if problem.gated or all(unit.only_drops for unit in problem.units):
            name = MILLISECONDS if self.device_megabytes is None else DEVICE
            raise SettingError(name, owner=owner, allowed="null where parts can be dropped", got=getattr(self, name))
        try:
            limits = [limit for limit in (self._device(problem), self._time(problem)) if limit is not None]
        except SettingError as error:
            error.owner = owner
            raise
        bounded = problem
        for limit in limits:
            self._check(limit, replace(problem, limits=()))
            bounded = replace(bounded, limits=(*bounded.limits, limit))
        if not bounded.feasible(bounded.uniform()):
            names = " and ".join(f"budget.{limit.name}" for limit in limits)
            raise BudgetError(f"{names} must be larger: no allocation within the budget was found that holds both")
        return bounded

    def _device(self, problem: Problem) -> Limit | None:
        if self.device_megabytes is None:
            return None
        here = self._on_device(problem.units)
        amounts = tuple(
            tuple(level.cost if there else 0 for level in unit.levels)
            for unit, there in zip(problem.units, here, strict=True)
        )
        bits = int(self.device_megabytes * 8e6 + 1e-6) - problem.fixed_bits
        return Limit(DEVICE, amounts, bits, parts=8e6, fixed=problem.fixed_bits)

    def _on_device(self, units: Sequence[Unit]) -> list[bool]:
        """Return which units are on the device.

        Raises:
            SettingError: A pattern matches nothing, a tie has layers on both sides, or there are no experts to leave in
                host memory where no pattern is given.
        """
        layers = [layer for unit in units for layer in unit.layers]
        if self.on_device is None:
            there = {layer.name for layer in layers if ACTIVE_SHARE not in layer.columns}
            if len(there) == len(layers):
                raise SettingError(
                    "on_device",
                    allowed="patterns of the units on the device: this model has no experts to leave in host memory",
                    got=None,
                    hint="as budget.on_device=['self_attn.*']",
                )
        else:
            names = {layer.name: layer.kind for layer in layers}
            pairs = enumerate(self.on_device)
            there = {name for at, pattern in pairs for name in matched(f"on_device[{at}]", pattern, names)}
        both = [unit.name for unit in units if len({layer.name in there for layer in unit.layers}) == 2]
        if both:
            raise SettingError(
                "on_device", allowed="patterns that keep tied layers together", got=self.on_device, hint=both[0]
            )
        return [unit.layers[0].name in there for unit in units]

    def _time(self, problem: Problem) -> Limit | None:
        if self.milliseconds is None:
            return None
        amounts = latencies(problem.units, setting=MILLISECONDS)
        return Limit(MILLISECONDS, amounts, int(self.milliseconds * NANOSECONDS + 1e-6), parts=NANOSECONDS)

    @staticmethod
    def _check(limit: Limit, problem: Problem) -> None:
        """Raise BudgetError where nothing holds a limit within a problem's size."""
        least = least_within_budget(problem.costs, problem.budget, limit)
        if limit.most < least:
            unit = SHOWN[limit.name]
            raise BudgetError(
                f"budget.{limit.name} must be at least {_rounded_up(limit.shown(least)):g} {unit} here (the most that "
                f"these levels can use is {_rounded_up(limit.shown(limit.largest)):g} {unit}), got "
                f"{limit.shown(limit.most):g}"
            )


def _positive(name: str, value: float | None) -> float | None:
    return None if value is None else check_number(name, value, low=0, high=MOST, exclusive=True)


def _rounded_up(value: float) -> float:
    return -(-value * 1000 // 1) / 1000
