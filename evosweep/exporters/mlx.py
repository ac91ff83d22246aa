"""Checkpoints that mlx-lm loads as they are (``mlx_lm.load(folder)``), for Apple silicon."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from evosweep.compressors.base import Compressor
from evosweep.compressors.integer import IntegerLevels
from evosweep.core.errors import SettingError
from evosweep.exporters.base import TOLERANCE
from evosweep.exporters.bit_stream import pack_words, unpack_words
from evosweep.exporters.integer_layers import IntegerExporter, IntegerLayer, Shape, Tensors, commonest
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.store.units import Units

GLOBAL = "full_attention"
LOCAL = "sliding_attention"
UNREAD = ("gpt_neox",)  # families that mlx-lm has, and whose quantized layers it does not find (0.32)


class MLX(IntegerExporter):
    """Writes MLX's affine quantization: ``weight`` is a dense stream of codes, and a weight is scale·code + bias.

    A group's bias is −scale·zero in the model's type, where the budget counts the zero's own few bits, or none. In 16
    bits it is exact for symmetric levels, else to within zero/4096 of a step. Codes and scales are exact.

    mlx-lm reads ``quantization`` of ``config.json``: width and group by module (``mlx_lm/utils.py``, ``load_model``).
    """

    contents = "MLX's quantized weights (pip install mlx-lm)"
    loading = "from evosweep.exporters.mlx import load_mlx\n\nmodel = load_mlx(folder)"
    engine_loading = "from mlx_lm import load\n\nmodel, tokenizer = load(folder)"
    name = "mlx"
    tolerance: ClassVar = {**TOLERANCE, torch.float16: 1e-2}  # biases of asymmetric levels are rounded
    widths = (1, 2, 3, 4, 5, 6, 8)
    groups = (32, 64, 128)
    outer = True
    metadata = "mlx"

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where the format cannot hold what a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        super().check(compressor, drop, anatomy, units)
        model_type = getattr(anatomy.model.config, "model_type", "")
        if model_type in UNREAD:
            hint = f"mlx-lm does not load quantized {model_type}"
            raise SettingError("", owner=self, allowed=("dense", "packed", "none"), got=self.name, hint=hint)
        kinds: list[str] = getattr(anatomy.model.config, "layer_types", None) or []
        period = kinds.index(GLOBAL) + 1 if GLOBAL in kinds else 1
        even = all((kind == GLOBAL) == (number % period == 0) for number, kind in enumerate(kinds, start=1))
        if len(set(kinds)) > 1 and (drop.granularity is not None or not even):
            hint = "mlx-lm counts from the first block which ones see the whole text: drop=none"
            raise SettingError("", owner=self, allowed=("dense", "packed", "none"), got=self.name, hint=hint)

    def unheld(self, anatomy: Anatomy, parts: list[IntegerLevels]) -> str:
        """Return what bfloat16 scales and biases cannot hold: 8 bits are exact for powers of two times a scale.

        Args:
            anatomy: The model.
            parts: The compressors of integers.
        """
        exact = all(part.symmetric and part.coarse_scales for part in parts)
        if anatomy.dtype is torch.bfloat16 and not exact:
            return (
                "it keeps scales and biases in the model's type, and bfloat16 holds them for "
                "compressor.symmetric=true compressor.coarse_scales=true alone: those, or model.dtype=float16"
            )
        return ""

    def group_bits(self, width: int, dtype: torch.dtype) -> int:
        """Return the bits of a scale and a bias.

        Args:
            width: Not read.
            dtype: Type of the model.
        """
        del width
        return 16 + 8 * dtype.itemsize

    def tensors_of(self, layer: IntegerLayer, dtype: torch.dtype) -> Tensors:
        """Return ``weight``, ``scales`` of 16 bits, and ``biases`` in the model's type.

        Args:
            layer: Codes, scales and zeros.
            dtype: Type of the model.
        """
        biases = -layer.scales.float() * layer.zeros.float()
        return {
            "weight": pack_words(layer.codes, layer.width).view(torch.uint32),
            "scales": layer.scales.to(torch.bfloat16 if dtype is torch.bfloat16 else torch.float16),
            "biases": biases.to(dtype),
        }

    def weight_of(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return the fp32 weight (out, in).

        Args:
            tensors: ``weight``, ``scales`` and ``biases``.
            shape: As the config says it.
        """
        codes = unpack_words(tensors["weight"], shape.width).float().unflatten(-1, (-1, shape.group))
        scales, biases = (tensors[name].float().unsqueeze(-1) for name in ("scales", "biases"))
        return (codes * scales + biases).flatten(-2)

    def config_of(self, shapes: Mapping[str, Shape], whole: list[str], blocks: str) -> dict[str, Any]:
        """Return ``quantization``: the commonest width and group, and those of every layer.

        Args:
            shapes: How each layer is written, by path.
            whole: Not named: layers without scales are as they are.
            blocks: Not read.
        """
        del whole, blocks
        most = commonest(shapes)
        entries = {path: {"group_size": shape.group, "bits": shape.width} for path, shape in shapes.items()}
        return {"quantization": {"group_size": most.group, "bits": most.width, "mode": "affine", **entries}}

    def engine_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return rotary embeddings and attention windows under the names that mlx-lm reads.

        transformers 5 keeps them in ``rope_parameters``, one set or one for each type of layer, and ``layer_types``;
        most of mlx-lm's models know the older names alone, and take defaults where these are missing.
        """
        rope = config.get("rope_parameters") or {}
        kinds = config.get("layer_types") or []
        own: dict[str, Any] = {}
        if LOCAL in rope:
            own["rope_local_base_freq"] = rope[LOCAL]["rope_theta"]
        rope = rope.get(GLOBAL, rope)
        if "rope_theta" in rope:
            own |= {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"]}
        if "partial_rotary_factor" in rope:
            own |= dict.fromkeys(("partial_rotary_factor", "rotary_pct"), rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            own["rope_scaling"] = dict(rope)
        if LOCAL in kinds and GLOBAL in kinds:
            own["sliding_window_pattern"] = kinds.index(GLOBAL) + 1
        return own

    def shapes_of(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Return how each layer is written, by path, as a ``config.json`` says it."""
        entries = {path: entry for path, entry in config["quantization"].items() if isinstance(entry, dict)}
        return {path: Shape(entry["bits"], entry["group_size"], symmetric=False) for path, entry in entries.items()}


def load_mlx(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return a model that ``export=mlx`` wrote as a plain transformers model, dequantized; MLX is not needed.

    Args:
        folder: The exported folder.
        dtype: Type of the weights; None is the one that the model had.
    """
    return MLX().load(folder, dtype=dtype)
