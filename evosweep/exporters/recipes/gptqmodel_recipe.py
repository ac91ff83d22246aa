"""Recipes for GPTQModel: ``QuantizeConfig(dynamic=...)``, regular expressions of layers that differ from the rest."""

import json
import re
from typing import Any

from evosweep.exporters.recipes.listing import Listing, Setting, commonest

NAME = "GPTQModel"
FILE = "gptqmodel.json"
WIDTHS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)


def refusal(setting: Setting, family: str) -> str:
    """Return why GPTQModel cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    if setting.dense:
        return ""
    if setting.bits not in WIDTHS:
        return "it makes integers of 2, 3, 4 and 8 bits"
    if setting.group is not None and setting.group not in GROUPS:
        return f"its groups are {', '.join(map(str, GROUPS))} columns or a whole row"
    return ""


def files(listing: Listing) -> dict[str, str]:
    """Return the arguments of ``QuantizeConfig``."""
    base = commonest(listing.quantized().values())
    dynamic: dict[str, dict[str, Any]] = {}
    for path, setting in listing.layers.items():
        if setting.dense:
            dynamic[f"-:^{re.escape(path)}$"] = {}
            continue
        differing = {key: value for key, value in _arguments(setting).items() if value != _arguments(base)[key]}
        if differing:
            dynamic[f"+:^{re.escape(path)}$"] = differing
    if not listing.with_head():
        dynamic["-:^lm_head$"] = {}
    return {FILE: json.dumps({**_arguments(base), "dynamic": dynamic}, indent=1) + "\n"}


def command(listing: Listing) -> str:
    """Return the Python code that quantizes the base model."""
    return (
        "import json\n"
        "from gptqmodel import GPTQModel, QuantizeConfig\n\n"
        f"model = GPTQModel.load({listing.model!r}, QuantizeConfig(**json.load(open({FILE!r}))))\n"
        "model.quantize(texts)  # a few hundred strings\n"
        'model.save("out")'
    )


def _arguments(setting: Setting) -> dict[str, Any]:
    return {
        "bits": setting.bits,
        "group_size": -1 if setting.group is None else setting.group,
        "sym": setting.symmetric,
    }
