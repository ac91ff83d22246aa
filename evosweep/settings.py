"""From configuration to objects, with errors that name the setting."""

import inspect
import re
from collections import deque
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from evosweep.core.errors import EvosweepError, SettingError

_BUILT: deque[tuple[Any, str]] = deque(maxlen=256)  # objects and the groups that they were built from


def build(config: DictConfig, group: str, **extra: Any) -> Any:
    """Instantiate the part of the configuration called ``group``.

    Args:
        config: The whole configuration.
        group: A section with ``_target_``.
        extra: Further arguments.

    Raises:
        SettingError: A key that the target does not take, a missing value, or a target that does not exist.
    """
    section = config[group]
    check_keys(OmegaConf.to_container(section), group)
    try:
        missing = sorted(OmegaConf.missing_keys(section))
        if missing:
            raise SettingError(f"{group}.{missing[0]}", allowed="given", got="nothing")
        made = instantiate(section, **extra, _convert_="all")
        _BUILT.append((made, group))
        return made
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = user_error(error)
        if isinstance(cause, SettingError):
            cause = cause.at(_origin(config, _failed_path(error, group), cause.setting))
        if cause is not None:
            raise cause from error
        got = _first_line(error.__cause__ or error)
        raise SettingError(group, allowed="settings that fit together", got=got) from error


def with_path(error: EvosweepError) -> EvosweepError:
    """Return an error raised after construction with the path at which its owner stands in the configuration."""
    if isinstance(error, SettingError) and error.owner is not None:
        for made, path in reversed(_BUILT):
            if made is error.owner or error.owner in getattr(made, "__dict__", {}).values():
                return error.at(path)
    return error


def _failed_path(error: BaseException, group: str) -> str:
    """Return the path of the object that Hydra could not make: ``sampler.allocator`` inside of ``sampler``."""
    found = re.search(r"full_key: (\S+)", str(error))
    return found[1] if found else group


def _origin(config: DictConfig, path: str, setting: str) -> str:
    """Return the group in which users type a setting that one group takes from another: ``search.offspring``."""
    section = OmegaConf.select(config, path)
    raw = OmegaConf.to_container(section, resolve=False) if isinstance(section, DictConfig) else {}
    value = raw.get(setting) if isinstance(raw, dict) else None
    found = re.fullmatch(rf"\$\{{([\w.]+)\.{re.escape(setting)}\}}", str(value))
    if found:
        return found[1]
    return path


def check_keys(section: Any, path: str) -> None:
    """Raise SettingError where a section has a key that its target does not take."""
    if isinstance(section, list):
        for place, item in enumerate(section):
            check_keys(item, f"{path}[{place}]")
    if not isinstance(section, dict):
        return
    if "_target_" in section:
        known = _parameters(section["_target_"], path)
        for key in section:
            if known is not None and not str(key).startswith("_") and key not in known:
                raise SettingError(f"a setting of {path}", allowed=known, got=key)
    for key, value in section.items():
        check_keys(value, f"{path}.{key}")


def user_error(error: BaseException) -> EvosweepError | None:
    """Return the error of ours, or the missing value, that lies under Hydra's wrapping."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return None
        if isinstance(current, EvosweepError):
            return current
        if isinstance(current, MissingMandatoryValue):
            return SettingError(str(current.full_key), allowed="given", got="nothing")
        current = current.__cause__
    return None


def _parameters(target: str, path: str) -> list[str] | None:
    """Return the names that a target takes; None if it takes any."""
    try:
        signature = inspect.signature(get_object(target))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingError(f"{path}._target_", allowed="an importable class or function", got=target) from error
    kinds = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in kinds):
        return None
    return [parameter.name for parameter in kinds]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
