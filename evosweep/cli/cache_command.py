"""``evosweep cache``: lists and removes cached stores, models and downloads."""

import argparse
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evosweep.assets.cache_folder import cache_folder
from evosweep.core.errors import SettingError

KINDS = ("stores", "models", "wheels")  # level stores, unpacked models, downloads
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SPANS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache: its path, its bytes, and the seconds since it was last used."""

    path: Path
    bytes: int
    age: float


def add_commands(commands: Any) -> None:
    """Add ``cache list`` and ``cache clean`` to the command line."""
    cache = commands.add_parser("cache", help="list what is cached, and make room")
    inside = cache.add_subparsers(required=True)
    listed = inside.add_parser("list", help="show level stores, unpacked models and downloads, largest first")
    listed.set_defaults(call=_list)
    clean = inside.add_parser("clean", help="remove some of them; a run that needs one makes it anew")
    clean.add_argument("--older-than", help="last used before so long: 30d, 12h, 2w")
    clean.add_argument("--larger-than", help="at least so large: 1GB, 200MB")
    clean.add_argument("--all", action="store_true", help="everything")
    clean.add_argument("--dry-run", action="store_true", help="only show what would go")
    clean.set_defaults(call=_clean)


def entries() -> list[Entry]:
    """Return the entries of the cache, largest first."""
    found: list[Entry] = []
    root = cache_folder()
    for kind in sorted(path for path in root.iterdir() if path.is_dir() and path.name != "locks"):
        for path in kind.iterdir():
            if path.suffix == ".lock" or path.name.startswith("."):
                continue
            files = [file.stat() for file in [path, *path.rglob("*")] if file.is_file()]
            last = max([max(stat.st_atime, stat.st_mtime) for stat in files], default=path.stat().st_mtime)
            found.append(Entry(path, sum(stat.st_size for stat in files), time.time() - last))
    return sorted(found, key=lambda entry: -entry.bytes)


def _list(options: argparse.Namespace, conf: Path) -> None:
    del options, conf
    _show(entries(), f"in {cache_folder()}")


def _clean(options: argparse.Namespace, conf: Path) -> None:
    del conf
    age = 0.0 if options.older_than is None else _span(options.older_than)
    size = 0.0 if options.larger_than is None else _size(options.larger_than)
    if not (options.all or options.older_than or options.larger_than):
        raise SettingError("cache clean", allowed="told what: --older-than 30d, --larger-than 1GB or --all", got="none")
    chosen = [entry for entry in entries() if entry.age >= age and entry.bytes >= size]
    if not options.dry_run:
        chosen = [entry for entry in chosen if _removed(entry.path)]
    _show(chosen, "would be removed" if options.dry_run else "removed")


def _removed(path: Path) -> bool:
    """Remove an entry, unless a run is at work on it."""
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except Timeout:
        return False
    return True


def _show(found: list[Entry], what: str) -> None:
    for entry in found:
        name = entry.path.relative_to(cache_folder())
        print(f"{entry.bytes / 1e6:10.1f} MB   {entry.age / 86400:6.1f} days   {name}")  # noqa: T201
    total = sum(entry.bytes for entry in found)
    print(f"{total / 1e6:10.1f} MB   {len(found)} entries {what}")  # noqa: T201


def _span(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if not found:
        raise SettingError("--older-than", allowed="a number and m, h, d or w, as 30d", got=text)
    return float(found[1]) * _SPANS[found[2]]


def _size(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.upper())
    if not found or found[2] not in _UNITS:
        raise SettingError("--larger-than", allowed="a number and MB or GB, as 1GB", got=text)
    return float(found[1]) * _UNITS[found[2]]
