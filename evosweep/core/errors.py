"""Errors that a user can cause. Each message is one line: the setting, its allowed values, the value given."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

MOST_LISTED = 24  # choices shown in one line


class EvosweepError(Exception):
    """Base of all errors of evosweep; the message alone is enough to know what to change."""


class SettingError(EvosweepError):
    """An argument or setting has a value that is not allowed.

    A library raises it with the name of its own argument (``group``). The command line knows at which path of the
    configuration the object was built (``compressor``) and shows ``compressor.group``: see ``at``.

    Args:
        setting: Name of the argument; a name with a dot in it (``tokens.seq_len``) is already a full path, and an
            empty one means the owner itself.
        got: The value that was refused.
        allowed: What it may be, as a phrase or as the list of choices. For a list, the nearest match to
            ``got`` is suggested.
        hint: What else would help, one clause.
        owner: The object whose argument it is, for errors raised after construction.
    """

    def __init__(
        self, setting: str, *, got: object, allowed: str | Iterable[object], hint: str = "", owner: object = None
    ) -> None:
        if isinstance(allowed, str):
            phrase = allowed
            suggestion = ""
        else:
            options = [str(option) for option in allowed]
            phrase = _options(options)
            suggestion = did_you_mean(str(got), options)
        tail = f"; {hint}" if hint else ""
        self.setting = setting
        self.owner = owner
        self._rest = f" must be {phrase}, got {got!r}{suggestion}{tail}"
        super().__init__(f"{setting or type(owner).__name__}{self._rest}")

    def at(self, path: str) -> "SettingError":
        """Return the same error with the setting named by its full path, ``path.setting``.

        A setting that is a full path already stays as it is.
        """
        if "." in self.setting.split("[")[0] or not path:
            return self
        return _same(type(self), f"{path}.{self.setting}" if self.setting else path, self._rest)

    def renamed(self, setting: str, path: str) -> "SettingError":
        """Return the same error about another setting, of the section at ``path``."""
        return _same(type(self), setting, self._rest).at(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process rebuilds the error: a launcher's worker sends its errors to its parent."""
        return _same, (type(self), self.setting, self._rest)


class BudgetError(EvosweepError):
    """No allocation of this store meets the budget."""


class DataError(EvosweepError):
    """Text or tokens cannot be used."""


class ModelError(EvosweepError):
    """A model cannot be loaded, or its architecture is not supported."""


class AssetError(EvosweepError):
    """A file could not be downloaded or stored, or its hash is wrong."""


class StoreError(EvosweepError):
    """A level store is damaged or cannot be built."""


class ExportError(EvosweepError):
    """An export is not possible, or the exported model does not compute what was scored."""


def _options(options: list[str]) -> str:
    """Return choices as a phrase; of more than MOST_LISTED only their number."""
    if len(options) > MOST_LISTED:
        return f"one of {len(options)} that there are"
    return "one of " + ", ".join(options) if options else "left out, there is none"


def _same(kind: type[SettingError], setting: str, rest: str) -> SettingError:
    error = kind.__new__(kind, f"{setting}{rest}")
    error.setting = setting
    error.owner = None
    error._rest = rest
    return error


def did_you_mean(got: str, options: Iterable[str], *, key: Callable[[str], str] = str) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``options``, or an empty string.

    Args:
        got: What was given.
        options: What it may be.
        key: Returns the part of an option that ``got`` is compared with; the whole if not given.
    """
    lowered = {key(option).lower(): option for option in options}
    match = difflib.get_close_matches(got.lower(), list(lowered), n=1, cutoff=0.5)
    return f" (did you mean {lowered[match[0]]!r}?)" if match else ""
