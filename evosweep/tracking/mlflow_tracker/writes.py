"""Makes the writes of a run for the outbox: metrics, tags, files and pictures."""

import base64
import io
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlflow.tracking.context.registry import resolve_tags
from PIL import Image

from evosweep.core.files import json_safe
from evosweep.core.metrics import METRICS
from evosweep.core.problem import Problem
from evosweep.core.redact import redact
from evosweep.tracking.base import TextInput
from evosweep.tracking.mlflow_tracker.continued import process_tags
from evosweep.tracking.mlflow_tracker.spool import OPEN, SUMMARY, Write

PARAM_LENGTH = 6000
TAG_LENGTH = 5000
BATCH = 1000
RUN_ID = "MLFLOW_RUN_ID"  # environment: MLflow's own name for a run to go on with
DIGITS = 4  # significant ones of a result; MLflow's table shows every digit that was logged


def rounded(value: float) -> float:
    """Return a figure with as many digits as a table can show; whole parts are kept."""
    if not math.isfinite(value) or value == int(value):
        return value
    digits = max(DIGITS - 1 - math.floor(math.log10(abs(value))), 0)
    return round(value, digits)


def opening(
    experiment: str,
    *,
    name: str,
    tags: Mapping[str, str],
    multirun: str | None,
    run: str | None,
    folder: str | None,
) -> Write:
    """Return the write that opens a run.

    Args:
        experiment: Its name.
        name: Of the run.
        tags: Of the run.
        multirun: Name of the multirun that the run is a job of.
        run: Id of the run that goes on.
        folder: The run's folder, to find a run that goes on and whose id is not known.
    """
    return Write(
        OPEN,
        {
            "experiment": experiment,
            "name": name,
            "tags": {key: redact(str(value)) for key, value in tags.items()},
            "process": redact({**resolve_tags(), "mlflow.source.name": "evosweep", **process_tags()}),
            "multirun": multirun,
            "run": run,
            "folder": folder,
            "given": os.environ.get(RUN_ID),
            "key": str(uuid.uuid4()),
            "time": _now(),
        },
    )


def metrics(values: Mapping[str, float], *, step: int = 0) -> list[Write]:
    """Return writes of figures; infinite ones, which MLflow stores as something else, are left out.

    Args:
        values: Figure of each name.
        step: Generation that they belong to.
    """
    made = [(key, float(value)) for key, value in values.items() if math.isfinite(value)]
    return [
        Write("metrics", {"step": step, "time": _now(), "values": dict(made[start : start + BATCH])})
        for start in range(0, len(made), BATCH)
    ]


def params(values: Mapping[str, str]) -> Write:
    """Return a write of params, at most 100."""
    return Write("params", {"values": {key: redact(str(value))[:PARAM_LENGTH] for key, value in values.items()}})


def tags(values: Mapping[str, Any]) -> Write:
    """Return a write of tags."""
    return Write("tags", {"values": {key: redact(str(value))[:TAG_LENGTH] for key, value in values.items()}})


def text(content: str, path: str) -> Write:
    """Return a write of a text file; ``path`` is the artifact's, and credentials in the text are masked."""
    return Write("text", {"path": path, "text": redact(content)})


def table(value: Mapping[str, Any], path: str) -> Write:
    """Return a write of columns that MLflow shows as a table: ``{"columns": [..], "data": [[..], ..]}``.

    Args:
        value: Values of each column, by its name.
        path: Of the artifact.
    """
    columns = list(value)
    data = [list(line) for line in zip(*value.values(), strict=True)]
    return text(json.dumps(json_safe({"columns": columns, "data": data}), ensure_ascii=False), path)


def picture(pixels: npt.NDArray[np.uint8], *, key: str, step: int) -> Write:
    """Return a write of a picture that the image slider plays by step.

    Args:
        pixels: RGB values (height, width, 3).
        key: Name of the series of pictures.
        step: Generation that it belongs to.
    """
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format="png")
    png = base64.b64encode(held.getvalue()).decode()
    return Write("picture", {"key": key, "step": step, "time": _now(), "id": str(uuid.uuid4()), "png": png})


def file(path: Path) -> Write:
    """Return a write of a file as artifact."""
    return Write("file", {"path": str(path.absolute())})


def folder(path: Path) -> Write:
    """Return a write of all files of a folder as artifacts."""
    return Write("folder", {"path": str(path.absolute())})


def inputs(texts: Sequence[TextInput]) -> Write:
    """Return a write of the texts that were used, as the datasets of a run."""
    made = [
        {
            "name": one.name,
            "digest": one.digest[:36],
            "source": redact(one.source),
            "tokens": one.tokens,
            "context": one.context,
        }
        for one in texts
    ]
    return Write("inputs", {"texts": made})


def model(figures: Mapping[str, Any], export: Mapping[str, Any], *, name: str, path: Path) -> Write:
    """Return a write of the exported winner as a model.

    Args:
        figures: Of the search.
        export: How the weights are loaded, and under which name they are registered, if they are.
        name: Of the model.
        path: Folder of the weights.
    """
    known = {key: rounded(value) if isinstance(value, float) else value for key, value in figures.items()}
    return Write(
        "model",
        {
            "name": name,
            "path": str(path.absolute()),
            "load": str(export["load"]),
            "register": export.get("register"),
            "params": {key: str(value) for key, value in known.items()},
        },
    )


def finish_figures(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a finishing step's facts: all of its numbers, under ``finish/``."""
    return {f"finish/{name}": float(value) for name, value in facts.items() if isinstance(value, int | float)}


def started(problem: Problem, facts: Mapping[str, Any]) -> Write:
    """Return the write of a search's start: its problem and facts as tags."""
    return tags(
        {
            "units": len(problem.units),
            "problem": problem.fingerprint,
            "budget_bits": problem.budget,
            "budget_bits_per_weight": f"{problem.bits_per_weight(problem.budget):.6f}",
            **{key: value for key, value in facts.items() if key != "mlflow_run"},
        }
    )


def fact_figures(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return those of a search's facts that are metrics."""
    return {name: float(facts[name]) for name in METRICS if name in facts}


def exported(row: Mapping[str, Any]) -> list[Write]:
    """Return the writes of an export: a tag a fact of ``row["export"]``, ``row`` as the run's result, the model."""
    facts = tags({f"export.{key}": value for key, value in row["export"].items()})
    result = text(json.dumps(json_safe(dict(row)), indent=1, ensure_ascii=False), "result.json")
    figures = {name: row[name] for name in METRICS if name in row}
    export = row["export"]
    name = str(row.get("run", "winner"))
    models = [model(figures, export, name=name, path=Path(export["path"]))] if export.get("register") else []
    return [facts, *metrics(finish_figures(row.get("finish", {}))), result, *models]


def end(status: str) -> Write:
    """Return the write that ends a run."""
    return Write("end", {"status": status, "time": _now()})


def summary(
    experiment: str, multirun: str, *, status: str, files: Sequence[Path], note: str, best: Sequence[str]
) -> Write:
    """Return the write that ends a multirun's parent with the comparison of its jobs; the files are inline.

    Args:
        experiment: Its name.
        multirun: Its name.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        files: Comparison as tables and figures.
        note: Comparison in Markdown.
        best: Run ids or folders of the best jobs, the best of them first.
    """
    return Write(
        SUMMARY,
        {
            "experiment": experiment,
            "multirun": multirun,
            "status": status,
            "files": {path.name: base64.b64encode(path.read_bytes()).decode() for path in files},
            "note": redact(note),
            "best": list(best),
        },
    )


def _now() -> int:
    return int(time.time() * 1000)


class Series:
    """Figures over generations, without those that never change: a line of one value says nothing.

    The first value of a figure is held back until another one follows.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, int, int]] = {}  # value, its first step, its last step
        self._varied: set[str] = set()

    def add(self, values: Mapping[str, float], step: int) -> dict[int, dict[str, float]]:
        """Add the figures of a step; return those that are due for logging, by step."""
        points: dict[int, dict[str, float]] = {}
        for key, value in values.items():
            if not math.isfinite(value):
                continue
            if key not in self._varied:
                held, first, last = self._held.get(key, (value, step, step))
                if held == value:
                    self._held[key] = (held, first, step)
                    continue
                self._varied.add(key)
                for known in sorted({first, last}):
                    points.setdefault(known, {})[key] = held
            points.setdefault(step, {})[key] = value
        return points
