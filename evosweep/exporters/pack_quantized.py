"""Checkpoints of compressed-tensors, which vLLM serves and, for symmetric integers, plain transformers loads."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from evosweep.compressors.base import Compressor
from evosweep.core.checks import check_choice
from evosweep.core.errors import SettingError
from evosweep.core.files import write_json
from evosweep.exporters.base import Exporter, Winner
from evosweep.exporters.compressed_layers import (
    PACKED,
    Scheme,
    Tensors,
    compressed,
    decompressed,
    float_formats,
    integer_parts,
    quantization_config,
    unfit,
)
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.expert_slots import slot_at
from evosweep.models.fusion import fused_layers
from evosweep.models.load import LoadedModel
from evosweep.store.units import Units

OTHERS = ("dense", "packed", "none")
ENGINES = ("vllm", "transformers")
BY_HEAD = "query_key_value"  # last part of the name of a layer that holds the three head by head
WORD = 32  # bits of the words that zeros are packed into
TENSORS = "model.safetensors"
CONFIG = "config.json"
BY_TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"
)
BY_US = "from evosweep.exporters.pack_quantized import load_compressed\n\nmodel = load_compressed(folder)"


@dataclass(frozen=True)
class CompressedTensors(Exporter):
    """Writes integers packed to the bit with a scale, and a zero if asymmetric, a group; or FP8, MXFP4, NVFP4.

    Only whole blocks may be dropped, and scales of integers must be values of the model's type. transformers loads any
    mixture of symmetric integers. vLLM loads asymmetric ones, too, and fuses query, key and value, and gate and up,
    each of which must then have one scheme: ``units.tie=fused``.

    What is written is loaded again by transformers, where it can, else decompressed by compressed-tensors itself.

    Args:
        enabled: Whether to export at all.
        check_tokens: Validation tokens on which the reloaded model's logits are compared with the scored ones.
        engine: What runs the result: ``vllm``, or ``transformers`` alone, for which layers need no ties.
    """

    engine: str = "vllm"
    contents = "compressed-tensors (pip install 'compressed-tensors>=0.18')"
    loading = BY_US

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("engine", self.engine, ENGINES)
        if self.engine == "transformers":
            object.__setattr__(self, "loading", BY_TRANSFORMERS)
        if self.enabled and importlib.util.find_spec("compressed_tensors") is None:
            raise SettingError(
                "", owner=self, allowed=OTHERS, got="compressed_tensors", hint="pip install 'compressed-tensors>=0.18'"
            )

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where the format cannot hold what a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        compressors = [compressor, *([units.head] if units is not None and units.head is not None else [])]
        hint = next((text for made in compressors if (text := unfit(made) or self._refused(made, anatomy))), "")
        integers = [part for made in compressors for part in integer_parts(made)]
        if hint:
            pass
        elif anatomy.dtype is torch.bfloat16 and any(not part.coarse_scales for part in integers):
            hint = "it keeps scales in the model's type, bfloat16: compressor.coarse_scales=true, or model.dtype"
        elif drop.granularity == "sublayers":
            hint = "it cannot hold a block without its attention or MLP: drop=blocks"
        elif units is not None and units.embedding is not None:
            hint = "it leaves the embedding as it is: units.embedding=null"
        elif any(slot.layout != "linear" for slot in (units or Units()).layers(anatomy)):
            hint = "it has no layout for this model's transposed layers"
        if hint:
            raise SettingError("", owner=self, allowed=OTHERS, got="compressed_tensors", hint=hint)
        drop.check_export(anatomy)

    def _refused(self, compressor: Compressor, anatomy: Anatomy) -> str:
        """Return which levels the engine does not load, though compressed-tensors holds them; nothing if it does."""
        floats = float_formats(compressor)
        asymmetric = [part for part in integer_parts(compressor) if not part.symmetric]
        if self.engine == "transformers":
            if asymmetric:
                return "transformers loads symmetric bit-widths: compressor.symmetric=true, or export.engine=vllm"
            return f"transformers was not seen to load {floats[0]}: export.engine=vllm" if floats else ""
        shared = [name for name in floats if name in ("nvfp4", "fp8_tensor")]
        if shared:
            return (
                f"fused layers share the one scale that {shared[0]} has a layer, and ours have each its own: fp8, mxfp4"
            )
        for name, outputs in _pieces(anatomy):
            for width in (width for part in asymmetric for width in part.bits):
                if outputs * width % WORD:
                    return (
                        f"{name} has {outputs} outputs in a piece that vLLM moves, and zeros of {width} bits do not "
                        "fill whole words there: compressor.symmetric=true"
                    )
        return ""

    def ties(self, anatomy: Anatomy) -> list[tuple[str, ...]]:
        """Return the names of layers that must share a level, for vLLM."""
        return fused_layers(anatomy) if self.engine == "vllm" else []

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``model.safetensors`` and the config with its quantization.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        model: Any = loaded.model
        with winner.in_place():
            tensors: Tensors = winner.others()
            groups: dict[Scheme, list[str]] = {}
            for path, (_, index) in winner.layers().items():
                scheme, values = _level(winner, index)
                tensors |= {f"{path}.{name}": value for name, value in values.items()}
                if scheme is not None:
                    groups.setdefault(scheme, []).append(path)
            saved = {name: value.cpu().contiguous() for name, value in tensors.items()}
            save_file(saved, folder / TENSORS, metadata={"format": "pt"})
            written = {path for paths in groups.values() for path in paths}
            linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
            config = {
                **model.config.to_dict(),
                "architectures": [type(model).__name__],  # vLLM guesses where a config made in memory has none
                "quantization_config": quantization_config(groups, ignore=[n for n in linear if n not in written]),
            }
            write_json(folder / CONFIG, config)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)

    def _readme(self, winner: Winner, loaded: LoadedModel) -> str:
        serving = "\nvLLM serves it: `vllm serve .` in this folder.\n" if self.engine == "vllm" else ""
        return super()._readme(winner, loaded) + serving

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``from_pretrained``; decompressed where transformers does not load the scheme."""
        if not _plain(folder):
            return load_compressed(folder, dtype=dtype)
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False
        )
        return model


def load_compressed(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return an exported model with all weights decompressed by compressed-tensors, in eval mode.

    transformers does not load asymmetric or floating mixtures; this does, for a look at them outside of vLLM.

    Args:
        folder: A folder that ``export=compressed_tensors`` wrote.
        dtype: Type of the weights; None is the one that the model had.
    """
    folder = Path(folder)
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    groups = _groups(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype or config.dtype, trust_remote_code=False
    ).eval()
    tensors = load_file(folder / TENSORS)
    state = model.state_dict()
    with torch.no_grad():
        for group in groups:
            for path in group["targets"]:
                slot_at(model, path).write(decompressed(path, tensors, group))
        for name, value in tensors.items():
            if name in state and value.dtype.itemsize > 1:  # an FP8 weight has been decompressed above
                state[name].copy_(value)
    return model


def _pieces(anatomy: Anatomy) -> list[tuple[str, int]]:
    """Return the layers whose outputs vLLM moves as pieces, and a piece's outputs: zeros are packed along these.

    A fused layer's are one piece. Of one that holds query, key and value head by head, each head's are.
    """
    fused = [(name, anatomy.slot(name).shape[0]) for names in fused_layers(anatomy) for name in names]
    config: Any = anatomy.model.config
    by_head = [slot for slot in anatomy.slots if slot.name.endswith(BY_HEAD)]
    return fused + [(slot.name, config.hidden_size // config.num_attention_heads) for slot in by_head]


def _groups(folder: Path) -> list[dict[str, Any]]:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return list(config["quantization_config"]["config_groups"].values())


def _plain(folder: Path) -> bool:
    """Return whether transformers loads an exported checkpoint: symmetric integers."""
    return all(group["format"] == PACKED and group["weights"]["symmetric"] for group in _groups(folder))


def _level(winner: Winner, index: int) -> tuple[Scheme | None, Tensors]:
    """Return the scheme of the level that a layer has, None if it is not compressed, and its tensors."""
    return compressed(winner.stored(index), winner.evaluator.anatomy.dtype)
