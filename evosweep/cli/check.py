"""Checks that the configuration has every group and no unknown key, before torch is imported."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from evosweep.cli.compose import check_keys, sections
from evosweep.core.errors import SettingError

SECTIONS = (
    "model",
    "data",
    "tokens",
    "compressor",
    "transform",
    "drop",
    "units",
    "store",
    "evaluate",
    "budget",
    "sampler",
    "fitness",
    "scorer",
    "export",
    "tracking",
    "report",
    "storage",
)
PLAIN = ("search",)  # sections without _target_
OWN = {"export": ("jobs", "register"), "data": ("validation",)}  # keys that the command line reads itself


def check_config(config: DictConfig, conf: Path) -> None:
    """Raise SettingError where a group is missing, is no group, or has an unknown key.

    Args:
        config: Without ``hydra``.
        conf: Folder of the configuration's files.
    """
    known = _top_level(conf)
    for required in ("name", "seed"):
        if required not in config:
            raise SettingError(required, allowed="given", got=None)
    for key in config:
        if str(key) not in known:
            raise SettingError("a setting", allowed=sorted(known), got=str(key))
    for group in (*PLAIN, *SECTIONS):
        _check_section(config, group, conf)


def _check_section(config: DictConfig, group: str, conf: Path) -> None:
    value = OmegaConf.select(config, group, throw_on_missing=False)
    if not isinstance(value, DictConfig):
        options = choices(conf, group)
        raise SettingError(group, allowed=options or f"a group of settings ({group}.<setting>=...)", got=value)
    _, resolved = sections(config, group)
    if group in PLAIN:
        known = _keys_of_files(conf, group)
        for key in resolved:
            if key not in known:
                raise SettingError(f"a setting of {group}", allowed=sorted(known), got=key)
        return
    if "_target_" not in resolved:
        raise SettingError(f"{group}._target_", allowed="the class of this group", got=None)
    check_keys({key: item for key, item in resolved.items() if key not in OWN.get(group, ())}, group, light=True)


def check_hydra(config: DictConfig) -> None:
    """Raise SettingError where ``hydra`` has a key that Hydra does not know."""
    known = [*(field.name for field in fields(HydraConf)), "env"]  # a group that Hydra adds itself
    for key in config.hydra:
        if str(key) not in known:
            raise SettingError("a setting of hydra", allowed=known, got=str(key))


def choices(conf: Path, group: str) -> list[str]:
    """Return the names of a group's files; none where there is no such group."""
    folder = conf / group
    return sorted(path.stem for path in folder.glob("*.yaml")) if group and folder.is_dir() else []


def _top_level(conf: Path) -> set[str]:
    main: Any = OmegaConf.load(conf / "config.yaml")
    groups = {path.name for path in conf.iterdir() if path.is_dir()} - {"experiment", "hydra", "__pycache__"}
    return {str(key) for key in main if key not in ("defaults", "hydra")} | groups


def _keys_of_files(conf: Path, group: str) -> set[str]:
    """Return every key that some file of a group gives it."""
    known: set[str] = set()
    for path in sorted((conf / group).glob("*.yaml")):
        content: Any = OmegaConf.load(path)
        section: Iterable[Any] = content.get(group, {})
        known |= {str(key) for key in section}
    return known
