"""Errors a user can cause, each said in one line: the setting, what it may be, what it got."""

import difflib
from collections.abc import Iterable
from typing import Any


class EvosweepError(Exception):
    """Base of every error whose message alone tells the user what to change."""


class SettingError(EvosweepError):
    """A setting has a value that it may not have.

    Args:
        setting: Name as typed on the command line, e.g. ``search.offspring``.
        got: The offending value.
        allowed: What it may be, as a phrase or as the list of choices. For a list, the nearest match to
            ``got`` is suggested.
        hint: What else would help, one clause.
    """

    def __init__(self, setting: str, *, got: object, allowed: str | Iterable[object], hint: str = "") -> None:
        self.setting = setting
        if isinstance(allowed, str):
            phrase, suggestion = allowed, ""
        else:
            options = [str(option) for option in allowed]
            phrase = "one of " + ", ".join(options) if options else "nothing here"
            suggestion = did_you_mean(str(got), options)
        tail = f"; {hint}" if hint else ""
        super().__init__(f"{setting} must be {phrase}, got {got!r}{suggestion}{tail}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process says the same: a launcher's worker sends its errors home."""
        return _same, (type(self), self.setting, str(self))


class BudgetError(EvosweepError):
    """A budget that no allocation of this store can meet."""


class DataError(EvosweepError):
    """Text or tokens that cannot be used."""


class ModelError(EvosweepError):
    """A model that cannot be loaded or taken apart."""


class AssetError(EvosweepError):
    """A file from the package index that could not be had, or is not what it should be."""


class StoreError(EvosweepError):
    """A level store that is damaged or cannot be built."""


class ExportError(EvosweepError):
    """An exported model that does not reload as what was scored."""


def _same(kind: type[SettingError], setting: str, message: str) -> SettingError:
    error = kind.__new__(kind, message)
    error.setting = setting
    return error


def did_you_mean(got: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``options``, or an empty string."""
    lowered = {option.lower(): option for option in options}
    match = difflib.get_close_matches(got.lower(), list(lowered), n=1, cutoff=0.5)
    return f" (did you mean {lowered[match[0]]!r}?)" if match else ""
