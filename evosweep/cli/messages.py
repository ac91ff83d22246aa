"""Turns Hydra's errors into one line: the setting, its allowed values, the nearest match."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf

from evosweep.cli.check import choices
from evosweep.cli.compose import with_path
from evosweep.core.errors import EvosweepError, SettingError, did_you_mean

WELCOME = """\
evosweep fits a Hugging Face language model into a size: it finds which layers
to compress how hard, and writes the model. Without a setting it does nothing.

  evosweep +experiment=quickstart
      SmolLM2-135M in 107 MB by four allocators, some minutes
      on two CPU cores; downloads 120 MB once.
  evosweep model=hf model.path=<folder> data=text data.path=<file> \\
           budget.megabytes=100
      Your own model and text, at a size of your own.
  evosweep seed=0
      One search with the settings as they are; --cfg job shows them.

After a run: evosweep export | score | compare | resolve | resume <run folder>.
What is cached: evosweep cache list. More: evosweep --help."""

_CHOICE = re.compile(r"Could not (?:find|load) '([^']+)'|could not find '([^']+)'", re.I)
_OPTIONS = re.compile(r"Available options in '([^']+)':(.*?)(?:Config search path|$)", re.S)
_KEY = re.compile(r"full_key: (\S+)")
_QUOTED_KEY = re.compile(r"""(["'])([^"']*)\1\s*:""")
_QUOTING = {
    "{": "a mapping whose keys stand without quotes",
    "[": "a list whose entries are quoted for Hydra where they hold other than plain letters",
    "": "quoted for Hydra where it holds other than plain letters",
}
_OVERRIDE = re.compile(r"Could not override '([^']+)'")
_SEVERAL = re.compile(r"Ambiguous value for argument '([^=']+)=(.*?)'\n")
_DELETE = re.compile(r"Could not delete.*'([^']+)'")


def of(error: Exception, *, conf: Path) -> EvosweepError:
    """Return an error of composing the configuration as one that names the setting and its choices."""
    ours = _wrapped(error)
    if ours is not None:
        return with_path(ours)
    if isinstance(error, OverrideParseException):
        return _grammar(error)
    text = _chain(error)
    if "Config group override must be" in text:
        return _no_choice(conf)
    several = _SEVERAL.search(text)
    if several:
        key, values = several.groups()
        as_list = f", or one list ({key}=[{values}])" if "." in key else ""
        return EvosweepError(f"{key} must be one value, or several runs (-m {key}={values}){as_list}, got {values!r}")
    missing = _CHOICE.search(text)
    if missing:
        return _choice(missing.group(1) or missing.group(2), text, conf)
    return _key(text, conf)


def _key(text: str, conf: Path) -> EvosweepError:
    """Return the error of an unknown setting, or of an override that cannot be applied."""
    key = _KEY.search(text) or _OVERRIDE.search(text) or _DELETE.search(text)
    if not key:
        return EvosweepError(" ".join(text.split())[:500])
    if key.group(1) == "experiment":
        return EvosweepError("an experiment is added with a plus: +experiment=<name>")
    known = list(_known_keys(conf))
    if key.group(1) in known or key.group(1).startswith("hydra."):
        return EvosweepError(f"{key.group(1)} cannot be changed like this: {_first(text)}")
    return EvosweepError(
        f"there is no setting {key.group(1)!r}{did_you_mean(key.group(1), known)}; "
        f"python -m evosweep --cfg job shows all of them"
    )


def _choice(name: str, text: str, conf: Path) -> EvosweepError:
    """Return the error of an unknown choice, or of an unknown group."""
    options = _OPTIONS.search(text)
    group, _, choice = name.rpartition("/")
    listed = options.group(2).split() if options else choices(conf, group)
    if listed:
        return SettingError(group.lstrip("+") or "config group", allowed=sorted(listed), got=choice)
    groups = [path.name for path in conf.iterdir() if path.is_dir()]
    return EvosweepError(f"there is no config group {group or choice!r}{did_you_mean(group or choice, groups)}")


def _no_choice(conf: Path) -> EvosweepError:
    """Return the error of a group that was given a number, or null, instead of one of its files."""
    for argument in sys.argv[1:]:
        group, _, value = argument.lstrip("+").partition("=")
        listed = choices(conf, group)
        if listed and value not in listed and not set(value.split(",")) <= set(listed):
            return SettingError(group, allowed=listed, got=value)
    return EvosweepError("a config group must be given the name of one of its files; evosweep --help lists them")


def _grammar(error: OverrideParseException) -> EvosweepError:
    """Return how a value is quoted that Hydra's grammar cannot read."""
    typed = str(error.override)
    key, equals, value = typed.partition("=")
    if not equals:
        return EvosweepError(f"{typed!r} must be a setting and its value, as in seed=1")
    if any(value.count(begin) != value.count(end) for begin, end in ("[]", "{}")):
        return EvosweepError(f"{key.lstrip('+~')} must be a value whose brackets are closed, got {value!r}")
    mended = _mended(key, value)
    how = f"; in a shell: {shlex.quote(mended)}" if mended else ""
    return EvosweepError(f"{key.lstrip('+~')} must be {_QUOTING.get(value[:1], _QUOTING[''])}, got {value!r}{how}")


def _mended(key: str, value: str) -> str | None:
    """Return an override that Hydra's grammar reads, None where there is none to propose."""
    text = value
    if value.startswith("{"):
        text = _QUOTED_KEY.sub(r"\2:", value)
    elif value.startswith("[") and "{" not in value:
        items = value.removeprefix("[").removesuffix("]").split(",")
        text = f"[{','.join(map(_quoted, items))}]"
    elif not value.startswith("["):
        text = _quoted(value)
    proposed = f"{key}={text}"
    try:
        OverridesParser.create().parse_override(proposed)
    except HydraException:
        return None
    return proposed


def _quoted(value: str) -> str:
    inner = value.strip().strip("'\"").replace('"', '\\"')
    return f'"{inner}"'


def _wrapped(error: BaseException) -> EvosweepError | None:
    """Return the EvosweepError that Hydra's exception wraps, None if there is none."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None or isinstance(current, EvosweepError):
            return current
        current = current.__cause__
    return None


def _chain(error: BaseException) -> str:
    texts = []
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            break
        texts.append(str(current))
        current = current.__cause__
    return "\n".join(texts)


def _first(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


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
