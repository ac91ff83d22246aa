"""Recipes for exllamav3: YAML with the bits of every tensor, in which the last match wins (``doc/optimize.md``)."""

from typing import Any

import yaml

from evosweep.exporters.recipes.listing import Listing, Setting, commonest

NAME = "exllamav3"
FILE = "exllamav3.yaml"
HEAD_BITS = 6  # exllamav3's own default


def refusal(setting: Setting, family: str) -> str:
    """Return why exllamav3 cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    return "" if setting.bits is not None else "it makes 1 to 8 bits, and leaves no layer as it is"


def files(listing: Listing) -> dict[str, str]:
    """Return the recipe: first what counts for all tensors, then each layer."""
    base = commonest(listing.layers.values())
    weights = {unit.name: unit.numel for unit in listing.problem.units}
    inside = {path: setting for path, setting in listing.layers.items() if path != "lm_head"}
    total = sum(weights[path] * (setting.bits or 0) for path, setting in inside.items())
    head = listing.layers["lm_head"].bits if listing.with_head() else HEAD_BITS
    tensors: dict[str, Any] = {"*": base.bits, **{path: setting.bits for path, setting in inside.items()}}
    recipe = {
        "target_bpw": round(total / sum(weights[path] for path in inside), 4),
        "head_bits": head,
        "tensors": tensors,
    }
    return {FILE: yaml.safe_dump(recipe, sort_keys=False)}


def command(listing: Listing) -> str:
    """Return the command that quantizes the base model."""
    return f"python convert.py -i {listing.model} -w work -o out -rcp {FILE}"
