"""``result.json``: what a run found, in a versioned file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evosweep.core.errors import EvosweepError
from evosweep.core.files import write_json
from evosweep.core.metrics import METRICS

RESULT = "result.json"
VERSION = 2


def write_result(folder: Path, row: Mapping[str, Any]) -> Path:
    """Write a flat row as ``result.json``: figures under ``metrics``, infinite ones as null, anything else beside."""
    metrics = {name: row[name] for name in METRICS if name in row}
    others = {name: value for name, value in row.items() if name not in metrics}
    return write_json(folder / RESULT, {"version": VERSION, **others, "metrics": metrics})


def read_result(path: Path) -> dict[str, Any]:
    """Return a flat row: the figures and everything else of a ``result.json``.

    Raises:
        EvosweepError: The file cannot be read, holds no result, or was written by another version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvosweepError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EvosweepError(f"{path} is not JSON: {error}") from error
    version = value.get("version", 1) if isinstance(value, dict) else None
    if version != VERSION:
        raise EvosweepError(
            f"{path} has version {version} of results, this evosweep reads {VERSION}: run the first line of the "
            "config.yaml beside it again, or read it with the evosweep that wrote it"
        )
    metrics = {key: math.inf if item is None else item for key, item in value.pop("metrics", {}).items()}
    return {**value, **metrics}
