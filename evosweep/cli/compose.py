"""Builds objects from the configuration; every error names the setting by its path there.

Objects do not know the configuration: their constructors raise with the name of their own argument, and this walk over
``_target_`` adds the path at which the object stands.
"""

import functools
import importlib
import inspect
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evosweep.cli.hints import check_hints
from evosweep.cli.signature import parameters
from evosweep.core.budget import KINDS
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.latency import MILLISECONDS
from evosweep.core.second_budget import DEVICE

_BUILT: deque[tuple[Any, str, Mapping[str, Any]]] = deque(maxlen=1024)  # object, path, its section as written
LATER = ("problem", "seed", "evaluator", "fitness")  # arguments of partial objects that the run gives
_INTERPOLATION = re.compile(r"\$\{([\w.@]+)\}")


def build(config: DictConfig, group: str, *, without: tuple[str, ...] = (), **extra: Any) -> Any:
    """Return the object that a section of the configuration describes, its nested objects made first.

    Args:
        config: The whole configuration.
        group: Path of a section with ``_target_``.
        without: Keys of the section that are not arguments.
        extra: Further arguments.

    Raises:
        SettingError: A key that the target does not take, a missing value, or a value that the target refuses.
    """
    raw, value = sections(config, group)
    for key in without:
        raw.pop(key, None)
        value.pop(key, None)
    check_keys(value, group)
    check_given(value, group)
    return _Walk(raw).make({**value, **extra}, raw, group)


def sections(config: DictConfig, group: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a section of the configuration twice: as written, and with its interpolations resolved.

    Raises:
        SettingError: It is no section, or an interpolation in it names nothing.
    """
    section = OmegaConf.select(config, group, throw_on_missing=False)
    if not isinstance(section, DictConfig):
        raise SettingError(group, allowed=f"a group of settings ({group}.<setting>=...)", got=section)
    try:
        resolved: Any = OmegaConf.to_container(section, resolve=True)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise SettingError(str(error.full_key or group), allowed="a value that can be resolved", got=text) from error
    raw: Any = OmegaConf.to_container(section, resolve=False)
    return raw, resolved


def check_keys(section: Any, path: str, *, light: bool = False) -> None:
    """Raise SettingError where a section, or one inside it, has a key that its target does not take.

    Args:
        section: Its settings, resolved.
        path: Where it stands in the configuration.
        light: Leave out targets of other packages, which would have to be imported; ``build`` checks them.
    """
    if isinstance(section, list):
        for index, item in enumerate(section):
            check_keys(item, f"{path}[{index}]", light=light)
    if not isinstance(section, dict):
        return
    if "_target_" in section:
        own = str(section["_target_"]).startswith("evosweep.")
        known = parameters(section["_target_"], path) if own or not light else None
        if known is not None and section.get("_partial_"):
            known = [name for name in known if name not in LATER]
        for key in section:
            if known is not None and not str(key).startswith("_") and key not in known:
                raise SettingError(f"a setting of {path}", allowed=known, got=key)
    for key, value in section.items():
        check_keys(value, f"{path}.{key}", light=light)


def check_given(section: Any, path: str) -> None:
    """Raise EvosweepError where a value that has no default was not given."""
    if section == "???":
        raise EvosweepError(f"{path} must be given: {path}=...")
    if isinstance(section, dict):
        for key, value in section.items():
            check_given(value, f"{path}.{key}")
    elif isinstance(section, list):
        for index, item in enumerate(section):
            check_given(item, f"{path}[{index}]")


def with_path(error: EvosweepError) -> EvosweepError:
    """Return an error raised after construction with the path at which its owner stands in the configuration."""
    if isinstance(error, SettingError) and error.owner is not None:
        for made, path, raw in reversed(_BUILT):
            if made is error.owner:
                return _named(error, path, raw)
    return error


class Later:
    """A ``_partial_`` object: made when the rest of its arguments is known; its errors name the setting then, too.

    Args:
        target: The class or function.
        arguments: Arguments from the configuration.
        path: Where it stands there.
        raw: Its section as written.
    """

    def __init__(self, target: Any, arguments: Mapping[str, Any], path: str, raw: Mapping[str, Any]) -> None:
        self.target = target
        self.arguments = dict(arguments)
        self.path = path
        self.raw = raw
        self.__signature__ = inspect.signature(functools.partial(target, **arguments))  # read by inspect.signature

    def __call__(self, **rest: Any) -> Any:
        """Return the object."""
        return _made(self.target, {**self.arguments, **rest}, self.path, self.raw, known=set(rest))


class _Walk:
    """Makes the objects of one section, from the inside out."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def make(self, value: Any, raw: Any, path: str) -> Any:
        if isinstance(value, list):
            items = raw if isinstance(raw, list) else [None] * len(value)
            return [self.make(item, items[index], f"{path}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        written = raw if isinstance(raw, dict) else {}
        made = {key: self.make(item, written.get(key), f"{path}.{key}") for key, item in value.items()}
        if "_target_" not in value:
            return made
        target = _target(value["_target_"], path)
        arguments = {key: item for key, item in made.items() if not str(key).startswith("_")}
        if value.get("_partial_"):
            return Later(target, arguments, path, written)
        return _made(target, arguments, path, written)


def _target(name: Any, path: str) -> Any:
    """Return the class or function that a dotted path names."""
    try:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    except (AttributeError, ImportError, ValueError, TypeError) as error:
        raise SettingError(f"{path}._target_", allowed="an importable class or function", got=name) from error


def _made(
    target: Any, arguments: Mapping[str, Any], path: str, raw: Mapping[str, Any], *, known: set[str] | None = None
) -> Any:
    """Return ``target(**arguments)``; an error of it names the setting."""
    settings = {key: value for key, value in arguments.items() if key not in (known or ())}
    try:
        made = target(**arguments)
        check_hints(target, settings)
    except SettingError as error:
        owned = with_path(error)
        if owned is not error:
            raise owned from error
        if known and error.setting.split("[")[0] in known:
            raise
        raise _named(error, path, raw) from error
    except EvosweepError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        try:
            check_hints(target, settings)
        except SettingError as better:
            raise _named(better, path, raw) from error
        missing = re.search(r"missing \d+ required .*?argument[s]?: '(\w+)'", str(error))
        if missing and isinstance(error, TypeError):
            raise EvosweepError(f"{path}.{missing[1]} must be given: {path}.{missing[1]}=...") from error
        raise SettingError(path, allowed="settings that fit together", got=_first_line(error)) from error
    _BUILT.append((made, path, raw))
    return made


def _named(error: SettingError, path: str, raw: Mapping[str, Any]) -> SettingError:
    """Return the error with its setting's path, or with the path of the setting that this one is taken from."""
    name, bracket, rest = error.setting.partition("[")
    first = name.partition(".")[0]
    inside = [
        key for key, value in raw.items() if isinstance(value, dict) and name in value and "_target_" not in value
    ]
    if "." in name and first in raw:
        return error.renamed(f"{path}.{error.setting}", "")
    if name not in raw and inside:
        return error.at(f"{path}.{inside[0]}")
    found = _INTERPOLATION.fullmatch(str(raw.get(name, ""))) if name else None
    if found:
        section, _, key = found[1].rpartition(".")
        return error.renamed(f"{key}{bracket}{rest}", section)
    return error.at(path)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def imply_budget(config: DictConfig, overrides: Sequence[str]) -> None:
    """Set the default budget to null if a budget of another kind was typed without its group.

    ``budget.megabytes=100`` then needs no ``budget=megabytes`` beside it.
    """
    typed = [text.lstrip("+").partition("=")[0] for text in overrides if not text.endswith("=null")]
    names = [key.partition(".")[2] for key in typed if key.startswith("budget.")]
    kinds = [name for name in names if name in KINDS]
    alone = not kinds and bool({DEVICE, MILLISECONDS} & set(names))
    if (len(kinds) == 1 or alone) and "budget" not in typed:
        for other in set(KINDS) - set(kinds):
            config.budget[other] = None
