"""How long the kernel of a layer takes at a level: read from a table, kept as columns of units."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.core.errors import SettingError, did_you_mean
from evosweep.core.patterns import matcher
from evosweep.core.unit import Unit

NANOSECONDS = 1e6  # in a millisecond
COLUMN = "milliseconds/"  # and a level's name: column of a unit
MILLISECONDS = "milliseconds"  # entry of the table, and of results


class Objective:
    """What an allocation is judged by beside its size and loss.

    Args:
        latency: JSON file with ``milliseconds``: pattern of layers (a name, or the path inside of its block) -> level
            -> milliseconds of one call of the layer's kernel. ``benchmarks/layer_latency.py`` measures one. None:
            levels know no time.

    Raises:
        SettingError: The file cannot be read, or is no such table.
    """

    def __init__(self, *, latency: str | None = None) -> None:
        self.latency = latency
        self.table: Mapping[str, Mapping[str, float]] = {} if latency is None else _read(Path(latency))

    def __bool__(self) -> bool:
        return bool(self.table)

    def columns(self, units: Sequence[Unit]) -> dict[str, dict[str, float]]:
        """Return the milliseconds of units' levels as columns, by the unit's name; tied layers take theirs together.

        Args:
            units: With the levels that they may take.

        Raises:
            SettingError: A layer or a level is not in the table.
        """
        return {unit.name: self._of(unit) for unit in units} if self else {}

    def _of(self, unit: Unit) -> dict[str, float]:
        found: dict[str, float] = {}
        for layer in unit.layers:
            levels = self._levels(layer)
            for level in unit.levels:
                if level.name not in levels:
                    raise SettingError(
                        "latency",
                        owner=self,
                        allowed=f"a table with every level of {layer.name}",
                        got=self.latency,
                        hint=f"it lacks {level.name}, and has {', '.join(levels)}{did_you_mean(level.name, levels)}",
                    )
                column = f"{COLUMN}{level.name}"
                found[column] = found.get(column, 0.0) + levels[level.name]
        return found

    def _levels(self, layer: Unit) -> Mapping[str, float]:
        for pattern, levels in self.table.items():
            matches = matcher(pattern, setting="latency")
            if matches(layer.name) or matches(layer.kind):
                return levels
        raise SettingError(
            "latency",
            owner=self,
            allowed="a table with every layer",
            got=self.latency,
            hint=f"no pattern matches {layer.name}{did_you_mean(layer.kind, self.table)}",
        )


def times_of(units: Sequence[Unit], *, setting: str) -> npt.NDArray[np.float64]:
    """Return the milliseconds of every level of every unit, shape (units, longest ladder); past a ladder's end, 0.

    Args:
        units: With columns of milliseconds.
        setting: What asks for them.

    Raises:
        SettingError: A level does not know its time.
    """
    found = latencies(units, setting=setting)
    table = np.zeros((len(found), max(map(len, found))))
    for row, values in enumerate(found):
        table[row, : len(values)] = np.array(values) / NANOSECONDS
    return table


def latencies(units: Sequence[Unit], *, setting: str) -> tuple[tuple[int, ...], ...]:
    """Return the nanoseconds of every level of every unit.

    Args:
        units: With columns of milliseconds.
        setting: What asks for them.

    Raises:
        SettingError: A level does not know its time.
    """
    for unit in units:
        lacking = [level.name for level in unit.levels if f"{COLUMN}{level.name}" not in unit.columns]
        if lacking:
            raise SettingError(
                setting,
                allowed="used with objective.latency=<table.json>, by which levels know their kernel's time",
                got=f"level {lacking[0]} of {unit.name} without one",
            )
    return tuple(
        tuple(round(unit.columns[f"{COLUMN}{level.name}"] * NANOSECONDS) for level in unit.levels) for unit in units
    )


def _read(path: Path) -> Mapping[str, Mapping[str, float]]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingError("latency", allowed="a readable JSON file", got=str(path), hint=str(reason)) from error
    table = found.get(MILLISECONDS) if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table or not all(_is_row(row) for row in table.values()):
        raise SettingError(
            "latency",
            allowed='a table as {"milliseconds": {"self_attn.q_proj": {"3bit": 0.012}}}',
            got=str(path),
        )
    for pattern in table:
        matcher(pattern, setting="latency")
    return {str(pattern): {str(level): float(value) for level, value in row.items()} for pattern, row in table.items()}


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9 for value in row.values()
    )
