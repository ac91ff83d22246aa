"""Recipes for llm-compressor: YAML of a GPTQ stage with a group of layers for each setting.

The form is that of its ``examples/quantization_non_uniform``; the schemes are those of compressed-tensors.
"""

from typing import Any

import yaml

from evosweep.exporters.recipes.listing import INTEGER_WIDTHS, Listing, Setting

NAME = "llm-compressor"
FILE = "llm_compressor.yaml"
NUMBERS: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}


def refusal(setting: Setting, family: str) -> str:
    """Return why llm-compressor cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    if setting.dense or setting.bits in INTEGER_WIDTHS or setting.number in NUMBERS:
        return ""
    return "its schemes are integers of 2 to 8 bits, FP8, NVFP4 and MXFP4"


def files(listing: Listing) -> dict[str, str]:
    """Return the recipe."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for path, setting in listing.quantized().items():
        groups.setdefault(tuple(_scheme(setting).items()), []).append(path)
    ignored = [path for path, setting in listing.layers.items() if setting.dense]
    modifier = {
        "ignore": ignored if listing.with_head() else [*ignored, "lm_head"],
        "config_groups": {
            f"group_{number}": {"targets": paths, "weights": dict(scheme)}
            for number, (scheme, paths) in enumerate(groups.items())
        },
    }
    recipe = {"quant_stage": {"quant_modifiers": {"GPTQModifier": modifier}}}
    return {FILE: yaml.safe_dump(recipe, sort_keys=False, width=120)}


def command(listing: Listing) -> str:
    """Return the Python code that quantizes the base model."""
    return (
        "from llmcompressor import oneshot\n\n"
        f"oneshot(model={listing.model!r}, dataset=texts, recipe={FILE!r}, output_dir='out')"
    )


def _scheme(setting: Setting) -> dict[str, Any]:
    if setting.number:
        return {**NUMBERS[setting.number], "symmetric": True, "dynamic": False}
    row = {"strategy": "channel"} if setting.group is None else {"strategy": "group", "group_size": setting.group}
    return {"num_bits": setting.bits, "type": "int", "symmetric": setting.symmetric, **row, "dynamic": False}
