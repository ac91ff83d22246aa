"""Checkpoints that mlx-lm loads as they are (``mlx_lm.load(folder)``), for Apple silicon."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evosweep.compressors.integer import IntegerLevels
from evosweep.exporters.bit_stream import pack_words, unpack_words
from evosweep.exporters.integer_layers import IntegerExporter, IntegerLayer, Shape, Tensors, commonest
from evosweep.models.anatomy import Anatomy


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
    widths = (1, 2, 3, 4, 5, 6, 8)
    groups = (32, 64, 128)
    outer = True
    metadata = "mlx"

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
