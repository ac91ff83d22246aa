"""A level store on disk: a manifest and one safetensors file a block."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from evosweep.compressors.payload import Layout, Payload
from evosweep.core.errors import StoreError, did_you_mean
from evosweep.core.files import sha256_file
from evosweep.core.unit import Unit
from evosweep.models.dropping import DropEffect
from evosweep.store.manifest_rows import Manifest, ManifestUnit


def tensor_name(unit: str, level: str, path: str) -> str:
    """Return the name of a payload's tensor in its block's file.

    Args:
        unit: Name of the unit.
        level: Name of the level.
        path: The tensor's path name within the payload.
    """
    return f"{unit}|{level}|{path}"


@dataclass(frozen=True)
class Stored:
    """A payload on disk.

    Attributes:
        layout: How its tensors are put together.
        names: Name of each tensor in the file, by its path name within the payload.
        file: The open file.
    """

    layout: Layout
    names: Mapping[str, str]
    file: Any

    @classmethod
    def of(cls, row: ManifestUnit, level: str, file: Any) -> "Stored":
        """Return a level of a unit.

        Args:
            row: The unit.
            level: Name of a level that has tensors.
            file: The open file.
        """
        layout = row.payloads[level]
        own = {path: tensor_name(row.name, level, path) for path in layout.paths()}
        return cls(layout, {path: row.shared.get(name, name) for path, name in own.items()}, file)

    @property
    def format(self) -> str:
        """Dotted path of the module that decodes it."""
        return self.layout.format

    @property
    def meta(self) -> Mapping[str, Any]:
        """Numbers and words that decoding needs."""
        return self.layout.meta

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return its tensors by path name, memory-mapped."""
        return {path: self.file.get_tensor(name) for path, name in self.names.items()}

    def assemble(self, tensors: Mapping[str, torch.Tensor]) -> Payload:
        """Return the payload, made of ``tensors()`` wherever these have been moved to."""
        return self.layout.assemble(tensors)


class LevelStore:
    """Every (unit, level) payload of a model, read from a folder.

    Args:
        folder: The store's folder.
        verify: Whether the files of tensors are checked against their hashes; the manifest always is.

    Raises:
        StoreError: The manifest is missing, damaged or another store's, or a file is missing or changed.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        for name, expected in self.manifest.files.items() if verify else ():
            if _hash(folder / name) != expected:
                raise StoreError(f"level store {folder} is damaged: {name} is missing or changed")
        self._handles: dict[str, Any] = {}
        self.limits: Mapping[str, Sequence[str]] = {}  # names of the levels that remain of a unit, where not all do

    @property
    def key(self) -> str:
        """Content address."""
        return self.manifest.key

    @property
    def fixed_bits(self) -> int:
        """Bits of everything in the model that is not a unit."""
        return self.manifest.fixed_bits

    @property
    def size(self) -> int:
        """Bytes on disk of all payloads."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units with levels, costs and columns, in the order in which the model computes them."""
        return tuple(row.unit() for row in self.manifest.units)

    @cached_property
    def drops(self) -> dict[int, DropEffect]:
        """What dropping does to the model, by the unit's index."""
        rows = enumerate(self.manifest.units)
        return {index: DropEffect.of(row.drop) for index, row in rows if row.drop is not None}

    def limited(self, ladders: Mapping[str, Collection[str]]) -> "LevelStore":
        """Return this store without some levels.

        Args:
            ladders: Names of the levels that remain of a unit, by its name; other units keep all of theirs.

        Raises:
            StoreError: A unit would have none left, as what remains was left out of the store.
        """
        if not ladders:
            return self
        rows = []
        for row in self.manifest.units:
            kept = ladders.get(row.name)
            levels = tuple(level for level in row.levels if kept is None or level.name in kept)
            if not levels:
                raise StoreError(
                    f"level store {self.key} has none of the levels that rules leave {row.name} "
                    f"({', '.join(kept or ())}), "
                    f"as others are no dearer and better; it has {', '.join(level.name for level in row.levels)}"
                )
            rows.append(replace(row, levels=levels))
        view = LevelStore(self.folder, verify=False)
        view.manifest = replace(self.manifest, units=tuple(rows))
        view.limits = {name: list(ladders[name]) for name in sorted(ladders)}
        return view

    def weight(self, unit: str, level: str, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the dequantized fp32 weight (out, in) of one level of one unit.

        Args:
            unit: Name of the unit.
            level: Name of the level.
            device: Where it is wanted.

        Raises:
            StoreError: The store has no such unit or level, or the level has no weight.
        """
        stored = self.payload(unit, level)
        tensors = {path: tensor.to(device, non_blocking=True) for path, tensor in stored.tensors().items()}
        return stored.assemble(tensors).weight

    def payload(self, unit: str, level: str) -> Stored:
        """Return one level of one unit as it is on disk.

        Raises:
            StoreError: The store has no such unit or level.
        """
        row = self._rows.get(unit)
        if row is None:
            raise StoreError(f"level store {self.key} has no unit {unit!r}{did_you_mean(unit, self._rows)}")
        if level not in row.payloads or row.file is None:
            nearest = did_you_mean(level, row.payloads)
            raise StoreError(f"level store {self.key} has no level {level!r} of {unit!r}{nearest}")
        return Stored.of(row, level, self._handle(row.file))

    @cached_property
    def _rows(self) -> Mapping[str, ManifestUnit]:
        return {row.name: row for row in self.manifest.units}

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            self._handles[name] = safe_open(self.folder / name, framework="pt")
        return self._handles[name]


def _hash(path: Path) -> str | None:
    """Return a file's SHA-256; None if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        return None
