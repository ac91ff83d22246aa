"""Validation of single arguments, with the same error messages in every constructor."""

import math
from collections.abc import Iterable

from evosweep.core.errors import SettingError


def check_int(setting: str, value: object, *, low: int | None = None, high: int | None = None) -> int:
    """Return ``value`` if it is an integer within [low, high].

    Args:
        setting: Name of the argument, for the error message.
        value: What the user gave.
        low: Least value allowed; None: no bound.
        high: Greatest value allowed; None: no bound.

    Raises:
        SettingError: It is no integer, or outside of the bounds.
    """
    bounds = _bounds("an integer", low, high)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingError(setting, allowed=bounds, got=value)
    if (low is not None and value < low) or (high is not None and value > high):
        raise SettingError(setting, allowed=bounds, got=value)
    return value


def check_number(
    setting: str, value: object, *, low: float | None = None, high: float | None = None, exclusive: bool = False
) -> float:
    """Return ``value`` as float if it is a finite number within [low, high].

    Args:
        setting: Name of the argument, for the error message.
        value: What the user gave.
        low: Least value allowed; None: no bound.
        high: Greatest value allowed; None: no bound.
        exclusive: Whether ``low`` itself is not allowed.

    Raises:
        SettingError: It is no finite number, or outside of the bounds.
    """
    bounds = _bounds("a number", low, high, exclusive=exclusive)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SettingError(setting, allowed=bounds, got=value)
    too_low = low is not None and (value <= low if exclusive else value < low)
    if too_low or (high is not None and value > high):
        raise SettingError(setting, allowed=bounds, got=value)
    return float(value)


def check_bool(setting: str, value: object) -> bool:
    """Return ``value`` if it is true or false; raise SettingError otherwise."""
    if not isinstance(value, bool):
        raise SettingError(setting, allowed="true or false", got=value)
    return value


def check_choice(setting: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Args:
        setting: Name of the argument, for the error message.
        value: What the user gave.
        choices: Values allowed.

    Raises:
        SettingError: It is none of them; the message suggests the nearest.
    """
    options = list(choices)
    if not isinstance(value, str) or value not in options:
        raise SettingError(setting, allowed=options, got=value)
    return value


def _bounds(noun: str, low: float | None, high: float | None, *, exclusive: bool = False) -> str:
    if low is not None and high is not None:
        between = (
            f"above {_shown(low)} and at most {_shown(high)}" if exclusive else f"from {_shown(low)} to {_shown(high)}"
        )
        return f"{noun} {between}"
    if low is not None:
        return f"{noun} above {_shown(low)}" if exclusive else f"{noun} of at least {_shown(low)}"
    return f"{noun} of at most {_shown(high)}" if high is not None else noun


def _shown(bound: float) -> str:
    """Return a bound as users write it: 1 rather than 1.0, and without what floating point adds."""
    return str(bound) if isinstance(bound, int) else f"{bound:.15g}"
