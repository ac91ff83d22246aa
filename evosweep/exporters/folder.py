"""The folder of an export: room on the disk, what becomes of a wrong one, the line that loads it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evosweep.core.errors import ExportError

DIFFERS = ".differs"  # behind the name of a folder that turned out to be another model


@contextmanager
def kept_aside(made: Path, folder: Path) -> Iterator[None]:
    """Keep what was made beside the folder that it was for, where it turns out not to compute what was scored.

    Args:
        made: What was made, in a temporary folder.
        folder: What it would have become.

    Raises:
        ExportError: As the body raises it, with where the files are.
    """
    try:
        yield
    except ExportError as error:
        aside = folder.with_name(f"{folder.name}{DIFFERS}")
        shutil.rmtree(aside, ignore_errors=True)
        made.rename(aside)
        raise ExportError(f"{error}; it is in {aside}, not in {folder}: please report it with its command") from error


def how_to_load(loading: str, folder: Path) -> str:
    """Return an exporter's ``loading`` code in one line, with the folder in it."""
    lines = [line for line in loading.splitlines() if line.strip()]
    return "; ".join(lines).replace("(folder", f"({str(folder)!r}")


def check_room(folder: Path, expected: int) -> None:
    """Raise ExportError where a folder's disk has no room for so many bytes."""
    parent = next(path for path in folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < expected:
        raise ExportError(
            f"the export takes about {expected / 1e6:.3g} MB in {folder}, where {free / 1e6:.3g} MB are free"
        )
