"""Recipes for torchao: ``FqnToConfig``, a configuration for each layer by its full name."""

from evosweep.exporters.recipes.listing import INTEGER_WIDTHS, Listing, Setting

NAME = "torchao"
FILE = "torchao_config.py"
HEAD = """\
import torch
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

"""


def refusal(setting: Setting, family: str) -> str:
    """Return why torchao cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    if setting.dense or setting.bits in INTEGER_WIDTHS or setting.number == "fp8":
        return ""
    return "its weight-only configurations are integers of 1 to 8 bits and FP8"


def files(listing: Listing) -> dict[str, str]:
    """Return a Python module with the configuration; layers that it does not name stay as they are."""
    lines = [f"    {path!r}: {_config(setting)},\n" for path, setting in listing.layers.items()]
    return {FILE: f'{HEAD}CONFIG = FqnToConfig({{\n{"".join(lines)}    "_default": None,\n}})\n'}


def command(listing: Listing) -> str:
    """Return the Python code that quantizes the base model while it loads."""
    return (
        "from transformers import AutoModelForCausalLM, TorchAoConfig\n\n"
        "from torchao_config import CONFIG\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({listing.model!r}, "
        "quantization_config=TorchAoConfig(quant_type=CONFIG))"
    )


def _config(setting: Setting) -> str:
    if setting.dense:
        return "None"
    if setting.number:
        return "Float8WeightOnlyConfig()"
    grain = "PerAxis(0)" if setting.group is None else f"PerGroup({setting.group})"
    mapping = "SYMMETRIC" if setting.symmetric else "ASYMMETRIC"
    dtype = f"torch.int{setting.bits}"
    return f"IntxWeightOnlyConfig(weight_dtype={dtype}, granularity={grain}, mapping_type=MappingType.{mapping})"
