"""Errors a user can cause, each said in one line: the setting, what it may be, what it got."""

import difflib
from collections.abc import Iterable
from typing import Any

MOST_LISTED = 24  # choices shown in one line


class EvosweepError(Exception):
    """Base of every error whose message alone tells the user what to change."""


class SettingError(EvosweepError):
    """An argument or a setting has a value that it may not have.

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
            phrase, suggestion = allowed, ""
        else:
            options = [str(option) for option in allowed]
            phrase = _options(options)
            suggestion = did_you_mean(str(got), options)
        tail = f"; {hint}" if hint else ""
        self.setting, self.owner = setting, owner
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


def _options(options: list[str]) -> str:
    """Return choices as a phrase; of very many, how many there are."""
    if len(options) > MOST_LISTED:
        return f"one of {len(options)} that there are"
    return "one of " + ", ".join(options) if options else "left out, there is none"


def _same(kind: type[SettingError], setting: str, rest: str) -> SettingError:
    error = kind.__new__(kind, f"{setting}{rest}")
    error.setting, error.owner, error._rest = setting, None, rest
    return error


def did_you_mean(got: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``options``, or an empty string."""
    lowered = {option.lower(): option for option in options}
    match = difflib.get_close_matches(got.lower(), list(lowered), n=1, cutoff=0.5)
    return f" (did you mean {lowered[match[0]]!r}?)" if match else ""
