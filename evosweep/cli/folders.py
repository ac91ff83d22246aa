"""Folders of runs: each run claims its own, checked to be writable before any work."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from evosweep.core.errors import SettingError
from evosweep.core.files import remove_empty_folders

LEAST_FREE = 10e6  # bytes; less ends in half-written files
CLAIM = "run.log"  # made exclusively: who makes it has the folder
RUN_FILES = ("config.yaml", "result.json", "allocation.json", CLAIM)
MOST_FOLDERS = 10_000  # runs started in one second


def claim(folder: Path, *, setting: str) -> Path:
    """Make a folder for one run or multirun alone and return it: the one asked for, or with ``-2``, ``-3`` ... behind.

    A folder that is there already is taken if it holds no run. Of two that ask at once, one makes the claim's file.

    Raises:
        SettingError: It cannot be made or written.
    """
    for number in range(1, MOST_FOLDERS):
        wanted = folder if number == 1 else Path(f"{folder.absolute()}-{number}")
        check_writable(wanted, setting=setting)
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            if any((wanted / name).exists() for name in RUN_FILES):
                continue
            (wanted / CLAIM).open("x").close()
        except FileExistsError:
            continue
        except OSError as error:
            hint = error.strerror or str(error)
            raise SettingError(setting, allowed="a folder that can be written", got=str(folder), hint=hint) from error
        return wanted
    raise SettingError(setting, allowed="a folder that holds no run yet", got=str(folder))


def check_writable(path: Path, *, setting: str, file: bool = False) -> None:
    """Raise SettingError unless a folder, or a file that may not exist yet, can be written.

    Args:
        path: The folder or file; the nearest folder that exists is tried.
        setting: What named it.
        file: Whether it is a file.
    """
    kind = "a file that can be written" if file else "a folder that can be written"
    if path.exists() and path.is_dir() == file:
        raise SettingError(setting, allowed=kind, got=str(path), hint=f"that is a {'folder' if file else 'file'}")
    if file and path.exists() and not path.is_file():
        raise SettingError(setting, allowed="an ordinary file", got=str(path))
    present = path.parent if file else path
    while not present.exists() and present != present.parent:
        present = present.parent
    try:
        if file and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        with tempfile.TemporaryFile(dir=present):
            pass
        free = shutil.disk_usage(present).free
    except OSError as error:
        hint = error.strerror or str(error)
        raise SettingError(setting, allowed=kind, got=str(path), hint=hint) from error
    if free < LEAST_FREE:
        raise SettingError(setting, allowed="on a disk with room", got=str(path), hint=f"{free / 1e6:.0f} MB are free")


def release(folders: Iterable[Path]) -> None:
    """Remove run folders that were created for this command and in which no run began."""
    for folder in folders:
        (folder / CLAIM).unlink(missing_ok=True)
        remove_empty_folders(folder, stop=Path.cwd())
