"""Checks values against the annotations of arguments, where constructors do not check them."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evosweep.core.errors import SettingError

SCALARS = (str, bool, int, float)
NAMES = {str: "text", bool: "true or false", int: "an integer", float: "a number", Path: "a path"}


def check_hints(target: Any, arguments: Mapping[str, Any]) -> None:
    """Raise SettingError where an argument is clearly of another kind than its annotation says.

    Args:
        target: A class or function.
        arguments: What it is given.
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # another package's annotations need not be resolvable
        return
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            raise _misfit(name, value, hints[name])


def _misfit(name: str, value: Any, hint: Any) -> SettingError:
    """Return the error of an argument, or of the one item of it that does not fit."""
    inside = typing.get_args(hint)
    if isinstance(value, dict) and len(inside) == 2:
        wrong = [(f"{name}.{key}", item, inside[1]) for key, item in value.items() if not fits(item, inside[1])]
    elif isinstance(value, list) and inside:
        wrong = [(f"{name}[{n}]", item, inside[0]) for n, item in enumerate(value) if not fits(item, inside[0])]
    else:
        wrong = []
    name, value, hint = wrong[0] if wrong else (name, value, hint)
    return SettingError(name, allowed=_words(hint), got=value)


def fits(value: Any, hint: Any) -> bool:  # noqa: PLR0911 - a case for each kind of annotation
    """Return False only where a value cannot be meant by an annotation."""
    origin = typing.get_origin(hint)
    inside = typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if hint is None or hint is type(None):
        return value is None
    if hint in SCALARS:
        return _is_scalar(value, hint)
    kind = origin or hint
    if kind is collections.abc.Callable:
        return callable(value)
    if kind in (collections.abc.Sequence, list, tuple):
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(fits(item, inside[0]) for item in value) if inside else is_list
    if kind in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping) and (not inside or all(fits(item, inside[1]) for item in value.values()))
    if inspect.isclass(kind):
        return not (value is None or isinstance(value, (*SCALARS, list, dict)))
    return True


def _is_scalar(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:  # noqa: PLR0911 - a case for each kind of annotation
    """Return an annotation in words."""
    origin = typing.get_origin(hint)
    inside = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(option) for option in inside))
    if hint is None or hint is type(None):
        return "null"
    if hint in NAMES:
        return NAMES[hint]
    kind = origin or hint
    if kind in (collections.abc.Sequence, list, tuple):
        return f"a list of {_words(inside[0])}" if inside else "a list"
    if kind in (collections.abc.Mapping, dict):
        return "named settings"
    if kind is collections.abc.Callable or kind is Callable:
        return "a section with _target_"
    return f"a section with _target_ ({getattr(kind, '__name__', kind)})"
