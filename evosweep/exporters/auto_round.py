"""Checkpoints that plain transformers loads where auto-round is installed, at any width from 2 to 8 bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evosweep.exporters.gptq_v2 import GPTQTensors, entry
from evosweep.exporters.integer_layers import Shape, commonest

WHOLE_LAYER = {"bits": 16, "act_bits": 16}


class AutoRound(GPTQTensors):
    """Writes auto-round's own format with GPTQ's tensors and zeros as they are: ``auto_round:gptqmodel``.

    ``extra_config`` names width, group and symmetry of every layer (``auto_round/inference/convert_model.py``,
    ``get_layer_config``). auto-round runs models in 16 bits: one that was scored in float32 is loaded as float16.
    """

    contents = "auto-round's quantized weights (pip install auto-round)"
    loading = "from evosweep.exporters.auto_round import load_auto_round\n\nmodel = load_auto_round(folder)"
    engine_loading = (
        "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"
    )
    name = "auto_round"
    widths = (2, 3, 4, 5, 6, 7, 8)

    def config_of(self, shapes: Mapping[str, Shape], whole: list[str], blocks: str) -> dict[str, Any]:
        """Return ``quantization_config`` with the commonest setting, and ``extra_config`` for every layer.

        Args:
            shapes: How each layer is written, by path.
            whole: Paths of the linear layers that are as they are.
            blocks: Path of the blocks.
        """
        return {
            "quantization_config": {
                "quant_method": "auto-round",
                "packing_format": "auto_round:gptqmodel",
                "data_type": "int",
                "block_name_to_quantize": blocks,
                **entry(commonest(shapes)),
                "extra_config": {
                    **{path: {**entry(shape), "data_type": "int"} for path, shape in shapes.items()},
                    **dict.fromkeys(whole, WHOLE_LAYER),
                },
            }
        }

    def shapes_of(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Return how each layer is written, by path, as a ``config.json`` says it."""
        return {
            path: Shape(found["bits"], found["group_size"], found["sym"])
            for path, found in config["quantization_config"]["extra_config"].items()
            if found["bits"] != WHOLE_LAYER["bits"]
        }


def load_auto_round(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Return a model that ``export=auto_round`` wrote as a plain transformers model, dequantized, without auto-round.

    Args:
        folder: The exported folder.
        dtype: Type of the weights; None is the one that the model had.
    """
    return AutoRound().load(folder, dtype=dtype)
