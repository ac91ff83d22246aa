"""The manifest of a level store as dataclasses, and its form on disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from evosweep.compressors.base import LevelSpec
from evosweep.compressors.payload import Layout
from evosweep.core.errors import StoreError
from evosweep.core.files import digest, write_json
from evosweep.core.unit import Level, Nominal, Unit

SCHEMA = 5  # raise when payloads or columns change meaning: older stores then are not reused
MANIFEST = "manifest.json"
DIGEST_LENGTH = 64


@dataclass(frozen=True)
class ManifestLevel:
    """One level of one unit.

    Attributes:
        name: Unique within the unit.
        cost: Size in bits.
        nominal: The number that users name it by.
        removed: Share of the unit's weights that it removes.
        error: Layer-output error; None where it was not measured.
        relative_error: The same over the squared norm of the dense layer's output.
        payload: How its tensors are put together; None before it is made, and for levels without tensors.
    """

    name: str
    cost: int
    nominal: Nominal
    removed: float = 0.0
    error: float | None = None
    relative_error: float | None = None
    payload: Layout | None = None

    @classmethod
    def planned(cls, spec: LevelSpec) -> "ManifestLevel":
        """Return what is known of a level before it is made."""
        return cls(spec.name, spec.cost, spec.nominal, spec.removed)

    def level(self) -> Level:
        """Return the level as searches see it."""
        return Level(
            name=self.name,
            cost=self.cost,
            error=self.error,
            relative_error=self.relative_error,
            nominal=self.nominal,
            removed=self.removed,
        )


@dataclass(frozen=True)
class ManifestUnit:
    """One unit.

    Attributes:
        name: Path of the module in the model.
        first: Name of its first linear layer, by which units are ordered.
        block: Index of the block that holds it.
        numel: Weights in it.
        levels: Its levels by rising cost.
        columns: Numbers that allocators read.
        gates: Names of units that are gone while this one is at its lowest level.
        shape: (out, in) of a linear layer.
        group: Name of the first layer that shares its input.
        file: Name of the file with its payloads.
        drop: What dropping it does to the model, for units that can be dropped.
        outer: Whether it is the embedding or the head.
        shared: Tensors that levels share, each once in the file: name -> the name under which it is there.
    """

    name: str
    first: str
    block: int
    numel: int
    levels: tuple[ManifestLevel, ...]
    columns: Mapping[str, float] = field(default_factory=dict)
    gates: tuple[str, ...] = ()
    shape: tuple[int, int] | None = None
    group: str | None = None
    file: str | None = None
    drop: Mapping[str, Any] | None = None
    outer: bool = False
    shared: Mapping[str, str] = field(default_factory=dict)

    def unit(self) -> Unit:
        """Return the unit as searches see it."""
        return Unit(
            name=self.name,
            numel=self.numel,
            block=self.block,
            levels=tuple(level.level() for level in self.levels),
            columns=self.columns,
            gates=self.gates,
            outer=self.outer,
        )

    def with_errors(self, errors: Mapping[str, float], *, whole: float) -> "ManifestUnit":
        """Return the unit with its levels' errors, by level name; relative ones are over ``whole``."""
        levels = tuple(
            replace(level, error=errors[level.name], relative_error=errors[level.name] / whole if whole else 0.0)
            for level in self.levels
        )
        return replace(self, levels=levels)

    @cached_property
    def payloads(self) -> Mapping[str, Layout]:
        """The layout of every level that has tensors, by level name."""
        return {level.name: level.payload for level in self.levels if level.payload is not None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "ManifestUnit":
        """Return the unit that a mapping describes."""
        return _UNIT.validate_python(row)

    def to_json(self) -> dict[str, Any]:
        """Return the unit as JSON values, without fields that have their defaults."""
        row: dict[str, Any] = _UNIT.dump_python(self, mode="json", exclude_defaults=True)
        return row


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a level store beside its tensors.

    Attributes:
        schema: Version of payloads and columns.
        key: Content address: the hash of ``address``, and the name of the store's folder.
        address: Everything that decides what is in the store: model, text, compressor, settings.
        model_name: What the user calls the model.
        calibration_tokens: Tokens that were calibrated on.
        calibration_documents: Ids of the documents that they are from.
        fixed_bits: Bits of everything in the model that is not a unit.
        files: SHA-256 of every file of tensors, by name.
        units: All units, in the order in which the model computes them.
    """

    schema: int
    key: str
    address: Mapping[str, Any]
    model_name: str
    calibration_tokens: int
    calibration_documents: tuple[str, ...]
    fixed_bits: int
    files: Mapping[str, str]
    units: tuple[ManifestUnit, ...]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, with a digest of its content."""
        content: dict[str, Any] = _MANIFEST.dump_python(self, mode="json", exclude_defaults=True)
        write_json(folder / MANIFEST, {"digest": digest(content, length=DIGEST_LENGTH), **content})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Return the manifest of a store, checked against its digest, its address and its folder.

        Raises:
            StoreError: It is missing, damaged, edited, of another version, or belongs to another store.
        """
        content = _content(folder)
        damaged = f"level store {folder} is damaged: {MANIFEST}"
        if content.pop("digest", None) != digest(content, length=DIGEST_LENGTH):
            raise StoreError(f"{damaged} was changed (it does not have its digest)")
        try:
            manifest = _MANIFEST.validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise StoreError(f"{damaged}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if not manifest.key == folder.name == digest(manifest.address):
            raise StoreError(f"level store {folder} holds another store, {manifest.key} of {manifest.model_name}")
        strangers = {unit.file for unit in manifest.units if unit.file} - set(manifest.files)
        if strangers or any(Path(name).name != name for name in manifest.files):
            raise StoreError(f"{damaged} names files that do not belong to it")
        return manifest


_UNIT = TypeAdapter(ManifestUnit)
_MANIFEST = TypeAdapter(Manifest)


def _content(folder: Path) -> dict[str, Any]:
    """Return the JSON object of a manifest of this version.

    Raises:
        StoreError: It is missing, no JSON object, or of another version.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{folder} is no level store: {MANIFEST} is missing or damaged") from error
    if not isinstance(content, dict):
        raise StoreError(f"{folder} is no level store: {MANIFEST} is no JSON object")
    schema = content.get("schema")
    if schema != SCHEMA:
        older = isinstance(schema, int) and schema < SCHEMA
        raise StoreError(
            f"level store {folder} was made by {'an older' if older else 'another'} version of evosweep "
            f"(schema {schema}, this one reads {SCHEMA})"
        )
    return content
