"""Export at the true size: codes, scales and masks as in the level store, and a loader that unpacks them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from evosweep.compressors.payload import Layout
from evosweep.core.errors import ExportError, ModelError
from evosweep.core.files import digest, sha256_file, write_json
from evosweep.exporters.base import Exporter, Winner
from evosweep.models.expert_slots import slot_at
from evosweep.models.load import LoadedModel
from evosweep.models.towers import loader_of

TENSORS = "packed.safetensors"  # transformers ignores this and the next
INDEX = "packed.json"
CONFIG = "config.json"
VERSION = 2


class PackedSafetensors(Exporter):
    """Writes packed levels, everything else in the model's type, and nothing of what is dropped."""

    contents = "packed weights at their true size"
    text_only = False
    loading = "from evosweep import load_packed\n\nmodel = load_packed(folder)"

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``packed.safetensors``, its index with their hashes, and the model's config.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        model: Any = loaded.model
        gone = winner.dropped_parameters()
        with winner.in_place():
            packed = {
                path: _payload(winner, index)
                for path, (slot, index) in winner.layers().items()
                if id(slot.parameter) not in gone
            }
            tensors = {
                f"{path}|{name}": value for path, (_, payload) in packed.items() for name, value in payload.items()
            }
            tensors |= winner.others(without=gone)
            dropped = [name for name, parameter in model.named_parameters() if id(parameter) in gone]
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / TENSORS)
            model.config.architectures = [type(model).__name__]  # says which class loads it
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        units = {path: unit for path, (unit, _) in packed.items()}
        write_index(folder, {"version": VERSION, "units": units, "dropped": dropped})

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``load``."""
        return load(folder, dtype=dtype)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index of a packed model, with the hashes of the files beside it and of itself."""
    files = {name: sha256_file(folder / name) for name in (TENSORS, CONFIG)}
    signed = {**index, "files": files}
    write_json(folder / INDEX, {**signed, "digest": digest(signed, length=64)})


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return a packed model, unpacked into a plain transformers model in eval mode.

    Args:
        folder: A folder that ``export=packed`` wrote.
        dtype: Type of the weights; None is the one that the model had.

    Raises:
        ExportError: The folder holds no packed model, one of another version, or a file in it was changed.
    """
    folder = Path(folder)
    index = _read_index(folder)
    try:
        tensors = load_file(folder / TENSORS)
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} is no packed model: {TENSORS} or {CONFIG} is missing or damaged") from error
    model = loader_of(folder).from_config(config, dtype=dtype or config.dtype, trust_remote_code=False).eval()
    if dtype is None or dtype is config.dtype:
        for name, parameter in model.named_parameters():
            if name in tensors:  # norms and routers of some models stay in fp32
                parameter.data = parameter.data.to(tensors[name].dtype)
    try:
        with torch.no_grad():
            _fill(model, index, tensors)
    except KeyError as error:
        raise ExportError(f"{folder} is no packed model: {error} of {TENSORS} is missing or damaged") from error
    return model


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a packed model, its version and the hashes of its files checked.

    Raises:
        ExportError: As for ``load``.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = index.get("version")
        found = index.pop("digest", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{folder} is no packed model: {INDEX} is missing or damaged") from error
    if version != VERSION:
        raise ExportError(f"{folder} has version {version}, this evosweep reads {VERSION}: export it again")
    if found != digest(index, length=64):
        raise ExportError(f"{folder / INDEX} was changed or is damaged: its content does not have its own digest")
    for name, expected in index["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            raise ExportError(f"{path} is missing or damaged: it does not have the SHA-256 that {INDEX} names")
    return dict(index)


def _fill(model: Any, index: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into a model by name, zeros where something was dropped.

    Args:
        model: Of the config in the folder.
        index: The index.
        tensors: The tensors of the file.

    Raises:
        ExportError: The model has a tensor that is neither in the file nor dropped, or lacks a layer of the index.
    """
    state = model.state_dict()
    filled: set[int] = set()
    for path, unit in index["units"].items():
        try:
            slot = slot_at(model, path)
        except ModelError as error:
            raise ExportError(f"the packed model has a layer {path} that its config does not have") from error
        layout = Layout.from_json(unit)
        slot.write(layout.assemble({name: tensors[f"{path}|{name}"] for name in layout.paths()}).weight)
        filled.add(slot.parameter.data_ptr())
    for name, value in state.items():
        if name in tensors or name in index["dropped"]:
            value.copy_(tensors[name]) if name in tensors else value.zero_()
            filled.add(value.data_ptr())
    missing = [name for name, value in state.items() if value.data_ptr() not in filled]  # tied ones are stored once
    if missing:
        raise ExportError(f"the packed model lacks {missing[0]} and {len(missing) - 1} more tensors")


def _payload(winner: Winner, index: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the index's entry and the tensors of the level that a unit has."""
    unit = winner.problem.units[index]
    level = unit.levels[int(winner.genome[index])].name
    stored = winner.stored(index)
    return {"level": level, **stored.layout.to_json()}, stored.tensors()
