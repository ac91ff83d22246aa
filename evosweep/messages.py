"""Hydra's errors, said the way ours are: one line, the setting, what it may be, the nearest match."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from evosweep.core.errors import EvosweepError, SettingError, did_you_mean
from evosweep.settings import user_error

_CHOICE = re.compile(r"Could not find '([^']+)'|could not find '([^']+)'", re.I)
_OPTIONS = re.compile(r"Available options in '([^']+)':(.*?)(?:Config search path|$)", re.S)
_KEY = re.compile(r"full_key: (\S+)")
_OVERRIDE = re.compile(r"Could not override '([^']+)'")


def of(error: Exception, *, conf: Path) -> EvosweepError:
    """Return what to tell the user about an error of composing the configuration."""
    ours = user_error(error)
    if ours is not None:
        return ours
    text = _chain(error)
    options = _OPTIONS.search(text)
    missing = _CHOICE.search(text)
    if missing:
        group, _, choice = (missing.group(1) or missing.group(2)).rpartition("/")
        listed = options.group(2).split() if options else _choices(conf, group)
        if listed:
            return SettingError(group.lstrip("+") or "config group", allowed=sorted(listed), got=choice)
        groups = [path.name for path in conf.iterdir() if path.is_dir()]
        return EvosweepError(f"there is no config group {group or choice!r}{did_you_mean(group or choice, groups)}")
    key = _KEY.search(text) or _OVERRIDE.search(text)
    if key:
        known = list(_known_keys(conf))
        return EvosweepError(
            f"there is no setting {key.group(1)!r}{did_you_mean(key.group(1), known)}; "
            f"python -m evosweep --cfg job shows all of them"
        )
    return EvosweepError(" ".join(text.split())[:500])


def _chain(error: BaseException) -> str:
    texts, current = [], error
    for _ in range(10):
        texts.append(str(current))
        if current.__cause__ is None:
            break
        current = current.__cause__
    return "\n".join(texts)


def _choices(conf: Path, group: str) -> list[str]:
    folder = conf / group
    return sorted(path.stem for path in folder.glob("*.yaml")) if group and folder.is_dir() else []


def _known_keys(conf: Path) -> Iterator[str]:
    """Yield every setting of the configuration as chosen on the command line, choices that compose included."""
    chosen = [argument for argument in sys.argv[1:] if re.fullmatch(r"\+?\w+=\w+", argument)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        for overrides in (chosen, []):
            try:
                config = compose("config", overrides=overrides)
            except Exception:
                continue
            yield from _walk(OmegaConf.to_container(config), "")
            return


def _walk(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            full = f"{path}.{key}" if path else str(key)
            yield full
            yield from _walk(item, full)
