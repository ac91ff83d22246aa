"""Where downloaded files, unpacked models and level stores live."""

import os
from pathlib import Path

import platformdirs


def cache_folder(*parts: str) -> Path:
    """Return (and create) a folder of the cache: ``$EVOSWEEP_CACHE``, else the platform's cache folder."""
    root = os.environ.get("EVOSWEEP_CACHE") or platformdirs.user_cache_dir("evosweep", appauthor=False)
    folder = Path(root).expanduser().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
