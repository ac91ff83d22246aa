"""The tensors of units' levels as they stand in a store's files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from evosweep.compressors.payload import Payload
from evosweep.store.manifest import tensor_name
from evosweep.store.manifest_rows import ManifestUnit

Tensors = dict[str, torch.Tensor]


def _named(unit: str, payloads: Mapping[str, Payload]) -> Tensors:
    """Return all tensors of a unit's levels by their names in the file."""
    return {
        tensor_name(unit, level, path): tensor
        for level, payload in payloads.items()
        for path, tensor in payload.flat().items()
    }


def stored_once(row: ManifestUnit, payloads: Mapping[str, Payload]) -> Tensors:
    """Return the tensors of a unit's levels by their names in the file, each of those that levels share once."""
    return {name: tensor for name, tensor in _named(row.name, payloads).items() if name not in row.shared}


def shared_tensors(unit: str, payloads: Mapping[str, Payload]) -> dict[str, str]:
    """Return the names of tensors that are there under an earlier name already, with that name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in _named(unit, payloads).items()}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors by name into a file."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
