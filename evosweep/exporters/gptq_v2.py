"""Checkpoints in GPTQ's tensors: for GPTQModel (``gptq_v2``), and for auto-round, which has more widths."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evosweep.compressors.integer import IntegerLevels
from evosweep.exporters.bit_stream import pack_words, unpack_words
from evosweep.exporters.integer_layers import IntegerExporter, IntegerLayer, Shape, Tensors, commonest
from evosweep.models.anatomy import Anatomy

ROW = -1  # size of a group that is a whole row, as these formats write it


class GPTQTensors(IntegerExporter):
    """Base of exporters that write ``qweight``, ``qzeros`` and ``scales``, with zeros as they are.

    ``qweight`` (in·bits/32, out) is a dense stream of codes along the inputs, ``qzeros`` (groups, out·bits/32) one of
    zeros along the outputs, ``scales`` are (groups, out). The format's first version keeps zero − 1, which cannot be
    written for a zero of 0; nothing here writes that.
    """

    groups = (16, 32, 64, 128, 256, 512, 1024, 0)
    multiple = (32, 32)
    half_only = True

    def unheld(self, anatomy: Anatomy, parts: list[IntegerLevels]) -> str:
        """Return that a bfloat16 model's scales are read as bfloat16, where they are not such values.

        Args:
            anatomy: The model.
            parts: The compressors of integers.
        """
        if anatomy.dtype is torch.bfloat16 and not all(part.coarse_scales for part in parts):
            return "its scales are read in the model's type, bfloat16: compressor.coarse_scales=true, or model.dtype"
        return ""

    def group_bits(self, width: int, dtype: torch.dtype) -> int:
        """Return the bits of a scale and a zero, which symmetric layers have as well.

        Args:
            width: Bits a code.
            dtype: Not read.
        """
        del dtype
        return 16 + width

    def tensors_of(self, layer: IntegerLayer, dtype: torch.dtype) -> Tensors:
        """Return ``qweight``, ``qzeros`` and ``scales``.

        Args:
            layer: Codes, scales and zeros.
            dtype: Not read: scales are fp16.
        """
        del dtype
        return {
            "qweight": pack_words(layer.codes, layer.width).T,
            "qzeros": pack_words(layer.zeros.T, layer.width),
            "scales": layer.scales.T,
        }

    def weight_of(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return the fp32 weight (out, in).

        Args:
            tensors: ``qweight``, ``qzeros`` and ``scales``.
            shape: As the config says it.
        """
        codes = unpack_words(tensors["qweight"].T.contiguous(), shape.width).float()
        zeros = unpack_words(tensors["qzeros"], shape.width).T.float().unsqueeze(-1)
        scales = tensors["scales"].T.float().unsqueeze(-1)
        return ((codes.unflatten(-1, (scales.shape[1], -1)) - zeros) * scales).flatten(-2)


class GPTQv2(GPTQTensors):
    """Writes ``checkpoint_format: gptq_v2``, which GPTQModel loads, with ``dynamic`` widths by layer.

    ``dynamic`` maps regular expressions of module names to settings; the first match counts, and names are written out
    in full. ``g_idx``, the group of each column, takes 32 bits a column that no budget counts.
    """

    contents = "GPTQ tensors, gptq_v2 (pip install gptqmodel)"
    loading = "from evosweep.exporters.gptq_v2 import load_gptq\n\nmodel = load_gptq(folder)"
    engine_loading = "from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load(folder)"
    name = "gptq"
    widths = (2, 3, 4, 8)
    column_bits = 32

    def tensors_of(self, layer: IntegerLayer, dtype: torch.dtype) -> Tensors:
        """Return the tensors of ``GPTQTensors``, and ``g_idx``: columns are in groups by their own position.

        Args:
            layer: Codes, scales and zeros.
            dtype: Not read.
        """
        columns = torch.arange(layer.codes.shape[1], dtype=torch.int32)
        return {**super().tensors_of(layer, dtype), "g_idx": columns // layer.group}

    def config_of(self, shapes: Mapping[str, Shape], whole: list[str], blocks: str) -> dict[str, Any]:
        """Return ``quantization_config`` with the commonest setting, and ``dynamic`` for every layer.

        Args:
            shapes: How each layer is written, by path.
            whole: Paths of the linear layers that are as they are.
            blocks: Not read.
        """
        del blocks
        dynamic = {f"+:^{re.escape(path)}$": entry(shape) for path, shape in shapes.items()}
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "checkpoint_format": "gptq_v2",
                "desc_act": False,
                "lm_head": False,
                "pack_dtype": "int32",
                **entry(commonest(shapes)),
                "dynamic": {**dynamic, **{f"-:^{re.escape(path)}$": {} for path in whole}},
            }
        }

    def shapes_of(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Return how each layer is written, by path, as a ``config.json`` says it."""
        dynamic = config["quantization_config"]["dynamic"]
        return {
            re.sub(r"\\(.)", r"\1", pattern[3:-1]): Shape(found["bits"], found["group_size"], found["sym"])
            for pattern, found in dynamic.items()
            if pattern.startswith("+:")
        }


def entry(shape: Shape) -> dict[str, Any]:
    """Return a layer's setting as GPTQModel and auto-round name it; a group of another size is a whole row."""
    group = shape.group if shape.group in GPTQTensors.groups else ROW
    return {"bits": shape.width, "group_size": group, "sym": shape.symmetric}


def load_gptq(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return a model that ``export=gptq`` wrote as a plain transformers model, dequantized; no engine is needed.

    Args:
        folder: The exported folder.
        dtype: Type of the weights; None is the one that the model had.
    """
    return GPTQv2().load(folder, dtype=dtype)
