"""The winner at its true size: codes, scales, masks as the level store has them, and a loader for transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from evosweep.compressors.payload import Layout
from evosweep.core.errors import ExportError
from evosweep.core.files import write_json
from evosweep.exporters.base import Exporter, Winner
from evosweep.models.load import LoadedModel
from evosweep.models.parts import parts_of

TENSORS, INDEX = "packed.safetensors", "packed.json"  # no name that transformers would take for a whole model
VERSION = 2  # 1 had no payloads within payloads


class PackedSafetensors(Exporter):
    """Writes packed levels, everything else in the model's type, and nothing of what is dropped."""

    loading = "from evosweep.exporters.packed import load\n\nmodel = load(folder)"

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``packed.safetensors``, its index and the model's config."""
        model: Any = loaded.model
        gone = _gone(winner)
        with winner.in_place():
            packed = {
                path: _payload(winner, place)
                for path, (site, place) in winner.layers().items()
                if id(site.module.weight) not in gone
            }
            tensors = {f"{path}|{part}": value for path, (_, parts) in packed.items() for part, value in parts.items()}
            tensors |= winner.others(without=gone)
            dropped = [name for name, each in model.named_parameters() if id(each) in gone]
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / TENSORS)
            units = {path: unit for path, (unit, _) in packed.items()}
            write_json(folder / INDEX, {"version": VERSION, "units": units, "dropped": dropped})
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``load``."""
        return load(folder, dtype=dtype)


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return a packed model, unpacked into a plain transformers model in eval mode.

    Args:
        folder: What ``export=packed`` wrote.
        dtype: Type of the weights; None is the one that the model had.

    Raises:
        ExportError: The folder holds no packed model, or one of another version or of other layers.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} is no packed model: {INDEX} or {TENSORS} is missing or damaged") from error
    if index.get("version") not in {1, VERSION}:
        raise ExportError(f"{folder} has version {index.get('version')}, this evosweep reads {VERSION}")
    config = transformers.AutoConfig.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype).eval()
    try:
        with torch.no_grad():
            _fill(model, index, tensors)
    except KeyError as error:
        raise ExportError(f"{folder} is no packed model: {error} of {TENSORS} is missing or damaged") from error
    return model


def _fill(model: Any, index: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors into a model where they belong, zeros where something was dropped.

    Raises:
        ExportError: The model has a tensor that is neither there nor dropped, or lacks a layer that is.
    """
    state, filled, version = model.state_dict(), set(), index["version"]
    for path, unit in index["units"].items():
        if f"{path}.weight" not in state:
            raise ExportError(f"the packed model has a layer {path} that its config has not")
        layout = Layout.from_json(unit if version == VERSION else {**unit, "tensors": unit["parts"], "parts": {}})
        weight = layout.assemble({part: tensors[f"{path}|{part}"] for part in layout.paths()}).weight
        transposed = isinstance(model.get_submodule(path), Conv1D)
        state[f"{path}.weight"].copy_(weight.T if transposed else weight)
        filled.add(state[f"{path}.weight"].data_ptr())
    for name, value in state.items():
        if name in tensors or name in index["dropped"]:
            value.copy_(tensors[name]) if name in tensors else value.zero_()
            filled.add(value.data_ptr())
    missing = [name for name, value in state.items() if value.data_ptr() not in filled]  # tied ones are there once
    if missing:
        raise ExportError(f"the packed model lacks {missing[0]} and {len(missing) - 1} more tensors")


def _payload(winner: Winner, place: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    unit = winner.problem.units[place]
    level = unit.levels[int(winner.genome[place])].name
    stored = winner.evaluator.store.payload(unit.name, level)
    return {"level": level, **stored.layout.to_json()}, stored.tensors()


def _gone(winner: Winner) -> set[int]:
    """Return the ids of the parameters of dropped sub-blocks."""
    silent = {site.name for site in winner.silent}
    if not silent:
        return set()
    parts = parts_of(winner.evaluator.anatomy, "sublayers")
    return {
        id(parameter)
        for part in parts
        if part.writer is not None and part.writer.name in silent
        for parameter in part.parameters
    }
