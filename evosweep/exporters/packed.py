"""The winner at its true size: codes, scales, masks as the level store has them, and a loader for transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from evosweep.compressors.base import decode
from evosweep.core.errors import ExportError
from evosweep.core.files import write_json
from evosweep.exporters.base import Exporter, Winner
from evosweep.models.load import LoadedModel
from evosweep.models.parts import parts_of

TENSORS, INDEX = "packed.safetensors", "packed.json"  # no name that transformers would take for a whole model
VERSION = 1


class PackedSafetensors(Exporter):
    """Writes packed levels, everything else in the model's type, and nothing of what is dropped."""

    loading = "from evosweep.exporters.packed import load\n\nmodel = load(folder)"

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``packed.safetensors``, its index and the model's config."""
        model: Any = loaded.model
        gone = _gone(winner)
        with winner.in_place():
            paths = {id(module): path for path, module in model.named_modules()}
            there = {
                paths[id(site.module)]: place
                for site, place in winner.levels.items()
                if id(site.module) in paths and id(site.module.weight) not in gone
            }
            packed = {path: _payload(winner, place) for path, place in there.items()}
            tensors = {f"{path}|{part}": value for path, (_, parts) in packed.items() for part, value in parts.items()}
            absent = gone | {id(site.module.weight) for site in winner.levels}
            owners = dict(model.named_parameters(remove_duplicate=False))
            seen: set[int] = set()
            for name, value in model.state_dict().items():
                if id(owners.get(name)) not in absent and value.data_ptr() not in seen:
                    seen.add(value.data_ptr())
                    tensors[name] = value
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / TENSORS)
            units = {path: unit for path, (unit, _) in packed.items()}
            write_json(folder / INDEX, {"version": VERSION, "units": units})
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
    if index.get("version") != VERSION:
        raise ExportError(f"{folder} has version {index.get('version')}, this evosweep reads {VERSION}")
    config = transformers.AutoConfig.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype).eval()
    with torch.no_grad():
        _fill(model, index["units"], tensors)
    return model


def _fill(model: Any, units: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors into a model where they belong; what has none was dropped, and is zero."""
    state, filled = model.state_dict(), set()
    for path, unit in units.items():
        if f"{path}.weight" not in state:
            raise ExportError(f"the packed model has a layer {path} that its config has not")
        parts = {part: tensors[f"{path}|{part}"] for part in unit["parts"]}
        weight = decode(unit["format"], parts, unit["meta"])
        transposed = isinstance(model.get_submodule(path), Conv1D)
        state[f"{path}.weight"].copy_(weight.T if transposed else weight)
        filled.add(state[f"{path}.weight"].data_ptr())
    for name, value in state.items():
        if name in tensors:
            value.copy_(tensors[name])
            filled.add(value.data_ptr())
    for value in state.values():
        if value.data_ptr() not in filled:  # tied weights are filled under one of their names
            value.zero_()


def _payload(winner: Winner, place: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    unit = winner.problem.units[place]
    level = unit.levels[int(winner.genome[place])].name
    stored = winner.evaluator.store.payload(unit.name, level)
    parts = stored.parts()
    return {"level": level, "format": stored.format, "meta": dict(stored.meta), "parts": sorted(parts)}, parts


def _gone(winner: Winner) -> set[int]:
    """Return the ids of the parameters of dropped sub-blocks."""
    silent = {site.name for site in winner.silent}
    if not silent:
        return set()
    parts = parts_of(winner.evaluator.anatomy, "sublayers")
    return {
        id(parameter)
        for part in parts if part.writer is not None and part.writer.name in silent
        for parameter in part.parameters
    }
