"""Recipes for mlx-lm: the predicate that ``mlx_lm.convert`` asks for each layer's width."""

import json
from typing import Any

from evosweep.exporters.recipes.listing import Listing, Setting, commonest

NAME = "mlx-lm"
FILE = "mlx_widths.json"
WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def refusal(setting: Setting, family: str) -> str:
    """Return why MLX cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    if setting.dense:
        return ""
    if setting.bits not in WIDTHS:
        return "it makes integers of 2, 3, 4, 5, 6 and 8 bits"
    return "" if setting.group in GROUPS else "its groups are 32, 64 or 128 columns"


def files(listing: Listing) -> dict[str, str]:
    """Return the layers' settings; false leaves a layer as it is."""
    settings: dict[str, Any] = {
        path: False if setting.dense else {"group_size": setting.group, "bits": setting.bits}
        for path, setting in listing.layers.items()
    }
    return {FILE: json.dumps(settings, indent=1) + "\n"}


def command(listing: Listing) -> str:
    """Return the Python code that converts the base model; embedding and head stay as they are unless listed."""
    base = commonest(listing.quantized().values())
    return (
        "import json\n\n"
        "from mlx_lm import convert\n\n"
        f"WIDTHS = json.load(open({FILE!r}))\n"
        f"convert({listing.model!r}, mlx_path='out', quantize=True, q_bits={base.bits}, q_group_size={base.group},\n"
        "        quant_predicate=lambda path, module: WIDTHS.get(path, False))"
    )
