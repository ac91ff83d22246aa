"""Checkpoints in compressed-tensors' format ``pack-quantized``, which plain transformers loads at their true size."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from evosweep.compressors.base import Compressor
from evosweep.compressors.formats.grouped_int import unpack
from evosweep.compressors.integer import IntegerLevels
from evosweep.core.errors import SettingError
from evosweep.core.files import write_json
from evosweep.exporters.base import Exporter, Winner
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.units import Units

Packed = dict[str, torch.Tensor]
OTHERS = ("dense", "packed", "none")


class CompressedTensors(Exporter):
    """Writes ``pack-quantized`` integers: codes packed to the bit, a scale a group, no zeros.

    So levels must be symmetric bit-widths, with scales that the model's type can hold, and only whole blocks may be
    dropped. transformers unpacks any mixture; vLLM, which reads the format too, has kernels for some widths only, and
    fuses query, key and value, and gate and up, each of which must then have one width (not tried here).
    """

    contents = "compressed-tensors (pip install compressed-tensors)"
    loading = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled and importlib.util.find_spec("compressed_tensors") is None:
            raise SettingError(
                "", owner=self, allowed=OTHERS, got="compressed_tensors", hint="pip install compressed-tensors"
            )

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where the format cannot hold what a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        hint = ""
        if not isinstance(compressor, IntegerLevels) or not compressor.symmetric:
            hint = "it holds symmetric bit-widths: compressor=gptq compressor.symmetric=true"
        elif anatomy.dtype is torch.bfloat16 and not compressor.coarse_scales:
            hint = "it keeps scales in the model's type, bfloat16: compressor.coarse_scales=true, or model.dtype"
        elif drop.granularity == "sublayers":
            hint = "it cannot hold a block without its attention or MLP: drop=blocks"
        elif units is not None and units.any:
            hint = "it leaves embedding and head as they are: units=none"
        elif any(slot.layout != "linear" for slot in anatomy.slots):
            hint = "it has no layout for this model's transposed layers"
        if hint:
            raise SettingError("", owner=self, allowed=OTHERS, got="compressed_tensors", hint=hint)

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``model.safetensors`` and the config with its quantization.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        model: Any = loaded.model
        with winner.in_place():
            tensors: Packed = winner.others()
            groups: dict[tuple[int, int], list[str]] = {}
            for path, (_, index) in winner.layers().items():
                width, group, packed = _packed(winner, index)
                tensors |= {f"{path}.{name}": value for name, value in packed.items()}
                groups.setdefault((width, group), []).append(path)
            values = {name: value.cpu().contiguous() for name, value in tensors.items()}
            save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
            write_json(folder / "config.json", {**model.config.to_dict(), "quantization_config": _scheme(groups)})
            if model.can_generate():
                model.generation_config.save_pretrained(folder)

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``from_pretrained``."""
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False
        )
        return model


def _packed(winner: Winner, index: int) -> tuple[int, int, Packed]:
    """Return a layer's width, group and tensors, its codes shifted to be signed and packed row by row."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: PLC0415 - an extra

    unit = winner.problem.units[index]
    stored = winner.evaluator.store.payload(unit.name, unit.levels[int(winner.genome[index])].name)
    rows, columns, width, group = (stored.meta[key] for key in ("rows", "columns", "width", "group"))
    tensors = stored.tensors()
    codes = unpack(tensors["codes"], width, rows * columns).view(rows, columns)
    signed = (codes.to(torch.int16) - 2 ** (width - 1)).to(torch.int8)
    return (
        width,
        group,
        {
            "weight_packed": pack_to_int32(signed, width),
            "weight_scale": tensors["scales"].to(winner.evaluator.anatomy.dtype),
            "weight_shape": torch.tensor([rows, columns]),
        },
    )


def _scheme(groups: dict[tuple[int, int], list[str]]) -> dict[str, Any]:
    """Return the quantization config: one group of layers for each (width, group size)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            f"group_{number}": {
                "targets": paths,
                "weights": {
                    "num_bits": width,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": group,
                    "dynamic": False,
                },
            }
            for number, ((width, group), paths) in enumerate(sorted(groups.items()))
        },
    }
