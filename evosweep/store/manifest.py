"""The level store as it lies on disk: a manifest and one safetensors file a block."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from evosweep.compressors.base import decode
from evosweep.core.errors import StoreError
from evosweep.core.files import sha256_file
from evosweep.core.unit import Level, Nominal, Unit

SCHEMA = 4  # raise when payloads or columns change meaning: older stores then are not reused
MANIFEST = "manifest.json"


def tensor_name(unit: str, level: str, part: str) -> str:
    """Return the name under which a part of a payload lies in its block's file."""
    return f"{unit}|{level}|{part}"


@dataclass(frozen=True)
class Stored:
    """A payload on disk: its format, what decoding needs, and its tensors' names in their open file."""

    format: str
    meta: Mapping[str, int]
    names: Mapping[str, str]
    file: Any

    def parts(self) -> dict[str, torch.Tensor]:
        """Return its tensors, memory-mapped."""
        return {part: self.file.get_tensor(name) for part, name in self.names.items()}


class LevelStore:
    """Every (unit, level) payload of a model, read from a folder.

    Args:
        folder: The store's folder.

    Raises:
        StoreError: No manifest, another schema, or a file is missing or does not have its hash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        for name, expected in self.manifest["files"].items():
            path = folder / name
            if not path.is_file() or sha256_file(path) != expected:
                raise StoreError(f"level store {folder} is damaged: {name} is missing or changed")
        self._handles: dict[str, Any] = {}

    @property
    def key(self) -> str:
        """Content address."""
        return str(self.manifest["key"])

    @property
    def fixed_bits(self) -> int:
        """Bits of everything in the model that is not a unit."""
        return int(self.manifest["fixed_bits"])

    @property
    def size(self) -> int:
        """Bytes on disk of all payloads."""
        return sum((self.folder / name).stat().st_size for name in self.manifest["files"])

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units with levels, costs and columns, in the order in which the model computes them."""
        return tuple(unit_of(row) for row in self.manifest["units"])

    @cached_property
    def drops(self) -> dict[int, dict[str, Any]]:
        """What dropping does, by the unit's place: ``blocks``, ``whole``, ``writer``."""
        return {place: row["drop"] for place, row in enumerate(self.manifest["units"]) if "drop" in row}

    def weight(self, unit: str, level: str, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the dequantized fp32 weight (out, in) of one level of one unit.

        Raises:
            StoreError: The store has no such unit or level.
        """
        stored = self.payload(unit, level)
        parts = {name: part.to(device, non_blocking=True) for name, part in stored.parts().items()}
        return decode(stored.format, parts, stored.meta)

    def payload(self, unit: str, level: str) -> "Stored":
        """Return where and how one level of one unit lies.

        Raises:
            StoreError: The store has no such unit or level.
        """
        row = self._rows.get(unit)
        if row is None or row["file"] is None or level not in row["payloads"]:
            raise StoreError(f"level store {self.key} has no level {level!r} of {unit!r}")
        made = row["payloads"][level]
        names = {part: tensor_name(unit, level, part) for part in made["parts"]}
        return Stored(made["format"], made["meta"], names, self._handle(row["file"]))

    @cached_property
    def _rows(self) -> Mapping[str, Any]:
        return {
            row["name"]: {"file": row.get("file"), "payloads": {level["name"]: level for level in row["levels"]}}
            for row in self.manifest["units"]
        }

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            self._handles[name] = safe_open(self.folder / name, framework="pt")
        return self._handles[name]


def unit_of(row: Mapping[str, Any]) -> Unit:
    """Return the unit that a row of the manifest, finished or only planned, describes."""
    return Unit(
        name=row["name"],
        numel=row["numel"],
        block=row["block"],
        levels=tuple(
            Level(
                name=level["name"],
                cost=level["cost"],
                error=level.get("error"),
                relative_error=level.get("relative_error"),
                nominal=Nominal(**level["nominal"]),
                removed=level["removed"],
            )
            for level in row["levels"]
        ),
        columns=row.get("columns", {}),
        gates=tuple(row.get("gates", ())),
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} is no level store: {path.name} is missing or damaged") from error
    if manifest.get("schema") != SCHEMA:
        raise StoreError(f"level store {folder} has schema {manifest.get('schema')}, this evosweep reads {SCHEMA}")
    return manifest
