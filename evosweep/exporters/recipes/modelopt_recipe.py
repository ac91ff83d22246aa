"""Recipes for NVIDIA ModelOpt: ``quant_cfg``, a list in which a later entry wins.

Its checkpoints hold INT4, INT8, FP8 and NVFP4 only (``modelopt/torch/quantization/config.py``).
"""

import pprint
from typing import Any

from evosweep.exporters.recipes.listing import Listing, Setting

NAME = "ModelOpt"
FILE = "modelopt_config.py"


def refusal(setting: Setting, family: str) -> str:
    """Return why ModelOpt cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    if setting.dense or setting.bits in (4, 8) or setting.number in ("fp8", "fp8_tensor", "nvfp4"):
        return ""
    return "it exports INT4, INT8, FP8 and NVFP4 only"


def files(listing: Listing) -> dict[str, str]:
    """Return a Python module with the configuration."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": f"{path}.weight_quantizer", "cfg": _quantizer(setting)}
        for path, setting in listing.quantized().items()
    ]
    text = pprint.pformat({"quant_cfg": entries, "algorithm": "max"}, sort_dicts=False, width=120)
    return {FILE: f"CONFIG = {text}\n"}


def command(listing: Listing) -> str:
    """Return the Python code that quantizes the base model."""
    return (
        "import modelopt.torch.quantization as mtq\n"
        "from modelopt.torch.export import export_hf_checkpoint\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "from modelopt_config import CONFIG\n\n"
        f"model = mtq.quantize(AutoModelForCausalLM.from_pretrained({listing.model!r}), CONFIG)\n"
        'export_hf_checkpoint(model, export_dir="out")'
    )


def _quantizer(setting: Setting) -> dict[str, Any]:
    if setting.number == "nvfp4":
        return {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    if setting.number == "fp8_tensor":
        return {"num_bits": (4, 3), "axis": None}
    if setting.number == "fp8":
        return {"num_bits": (4, 3), "axis": 0}
    if setting.group is None or setting.bits == 8:
        return {"num_bits": setting.bits, "axis": 0}
    return {"num_bits": setting.bits, "block_sizes": {-1: setting.group}}
