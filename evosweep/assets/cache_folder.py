"""The folder of downloaded files, unpacked models and level stores."""

import os
import shutil
from pathlib import Path

import platformdirs

from evosweep.core.errors import AssetError


def cache_folder(*names: str) -> Path:
    """Return (and create) a folder of the cache: ``$EVOSWEEP_CACHE``, else the platform's cache folder.

    Raises:
        AssetError: It does not exist and cannot be created.
    """
    root = os.environ.get("EVOSWEEP_CACHE") or platformdirs.user_cache_dir("evosweep", appauthor=False)
    folder = Path(root).expanduser().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(not_writable(folder, error)) from error
    return folder


def not_writable(folder: Path, error: OSError) -> str:
    """Return one line that says why ``folder`` cannot be written to, its free space, and what to do."""
    existing = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free / 1e6
    return (
        f"the cache folder {folder} cannot be written to: {error.strerror or error} ({free:.0f} MB are free there); "
        "make room or set EVOSWEEP_CACHE to another folder"
    )
