"""Makes the writes of a run for the outbox: metrics, tags, files and pictures."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from evosweep.core.files import json_safe
from evosweep.core.redact import redact
from evosweep.tracking.base import TextInput
from evosweep.tracking.mlflow_tracker.outbox import Write

PARAM_LENGTH = 6000
TAG_LENGTH = 5000
BATCH = 1000
DIGITS = 4  # significant ones of a result; MLflow's table shows every digit that was logged


def rounded(value: float) -> float:
    """Return a figure with as many digits as a table can show; whole parts are kept."""
    if not math.isfinite(value) or value == int(value):
        return value
    digits = max(DIGITS - 1 - math.floor(math.log10(abs(value))), 0)
    return round(value, digits)


def metrics(run: str, values: Mapping[str, float], *, step: int = 0) -> list[Write]:
    """Return writes of figures; infinite ones, which MLflow stores as something else, are left out.

    Args:
        run: Id of the run.
        values: Figure of each name.
        step: Generation that they belong to.
    """
    now = int(time.time() * 1000)
    made = [Metric(key, float(value), now, step) for key, value in values.items() if math.isfinite(value)]
    return [_batch(run, made[start : start + BATCH], step) for start in range(0, len(made), BATCH)]


def _batch(run: str, batch: Sequence[Metric], step: int) -> Write:
    content = {"run": run, "step": step, "metrics": {metric.key: metric.value for metric in batch}}
    return Write(lambda client: client.log_batch(run, metrics=batch), content)


def params(run: str, values: Mapping[str, str]) -> Write:
    """Return a write of params, at most 100."""
    made = [Param(key, redact(str(value))[:PARAM_LENGTH]) for key, value in values.items()]
    return Write(lambda client: client.log_batch(run, params=made), {"run": run, "params": dict(values)})


def tags(run: str, values: Mapping[str, Any]) -> Write:
    """Return a write of tags."""
    made = [RunTag(key, redact(str(value))[:TAG_LENGTH]) for key, value in values.items()]
    content = {"run": run, "tags": {tag.key: tag.value for tag in made}}
    return Write(lambda client: client.log_batch(run, tags=made), content)


def text(run: str, content: str, path: str) -> Write:
    """Return a write of a text file.

    Args:
        run: Id of the run.
        content: The text; credentials in it are masked.
        path: Of the artifact.
    """
    clean = redact(content)
    return Write(lambda client: client.log_text(run, clean, path), {"run": run, "artifact": path, "text": clean})


def table(run: str, value: Mapping[str, Any], path: str) -> Write:
    """Return a write of columns that MLflow shows as a table: ``{"columns": [..], "data": [[..], ..]}``.

    Args:
        run: Id of the run.
        value: Values of each column, by its name.
        path: Of the artifact.
    """
    columns = list(value)
    data = [list(line) for line in zip(*value.values(), strict=True)]
    return text(run, json.dumps(json_safe({"columns": columns, "data": data}), ensure_ascii=False), path)


def picture(run: str, pixels: npt.NDArray[np.uint8], *, key: str, step: int) -> Write:
    """Return a write of a picture that the image slider plays by step.

    Args:
        run: Id of the run.
        pixels: RGB values (height, width, 3).
        key: Name of the series of pictures.
        step: Generation that it belongs to.
    """
    return Write(
        lambda client: client.log_image(run, pixels, key=key, step=step, synchronous=True),
        {"run": run, "image": key, "step": step},
    )


def file(run: str, path: Path) -> Write:
    """Return a write of a file as artifact."""
    return Write(lambda client: client.log_artifact(run, str(path)), {"run": run, "file": str(path)})


def folder(run: str, path: Path) -> Write:
    """Return a write of all files of a folder as artifacts."""
    return Write(lambda client: client.log_artifacts(run, str(path)), {"run": run, "folder": str(path)})


def inputs(run: str, texts: Sequence[TextInput]) -> Write:
    """Return a write of the texts that were used, as the datasets of a run."""
    made = [
        DatasetInput(
            Dataset(
                name=text_input.name,
                digest=text_input.digest[:36],
                source_type="text",
                source=redact(text_input.source),
                profile=json.dumps({"tokens": text_input.tokens}),
            ),
            tags=[InputTag("mlflow.data.context", text_input.context)],
        )
        for text_input in texts
    ]
    return Write(
        lambda client: client.log_inputs(run, made), {"run": run, "inputs": [text_input.name for text_input in texts]}
    )


def finish_figures(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a finishing step's facts: all of its numbers, under ``finish/``."""
    return {f"finish/{name}": float(value) for name, value in facts.items() if isinstance(value, int | float)}


def exported(run: str, row: Mapping[str, Any]) -> list[Write]:
    """Return the writes of an export: a tag for each fact of ``row["export"]``, and ``row`` as the run's result."""
    facts = tags(run, {f"export.{key}": value for key, value in row["export"].items()})
    result = text(run, json.dumps(json_safe(dict(row)), indent=1, ensure_ascii=False), "result.json")
    return [facts, *metrics(run, finish_figures(row.get("finish", {}))), result]


def end(run: str, status: str) -> Write:
    """Return the write that ends a run."""
    return Write(lambda client: client.set_terminated(run, status=status), {"run": run, "status": status})


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
