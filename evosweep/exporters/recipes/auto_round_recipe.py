"""Recipes for AutoRound: the JSON of ``--layer_config`` (auto-round, ``docs/step_by_step.md``)."""

import json
from typing import Any

from evosweep.exporters.recipes.listing import INTEGER_WIDTHS, Listing, Setting, commonest

NAME = "AutoRound"
FILE = "auto_round.json"
ONLY_SYMMETRIC = 8  # bits; auto-round 0.16.1 raises otherwise, unless AR_ALLOW_W8_ASYM=1


def refusal(setting: Setting, family: str) -> str:
    """Return why AutoRound cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: Not read.
    """
    del family
    if setting.dense:
        return ""
    if setting.bits not in INTEGER_WIDTHS:
        return "its layer_config holds integers of 2 to 8 bits"
    if setting.bits == ONLY_SYMMETRIC and not setting.symmetric:
        return "it refuses 8 bits with zeros of their own, which its format's kernels do not have"
    return ""


def files(listing: Listing) -> dict[str, str]:
    """Return the layers' settings."""
    return {FILE: json.dumps({path: _entry(setting) for path, setting in listing.layers.items()}, indent=1) + "\n"}


def command(listing: Listing) -> str:
    """Return the command that quantizes the base model; its scheme counts for no layer of the list."""
    base = commonest(listing.quantized().values())
    symmetry = "" if base.symmetric else " --asym"
    return (
        f"auto-round --model {listing.model} --bits {base.bits} --group_size {_group(base)}{symmetry} "
        f'--format auto_round --layer_config "$(cat {FILE})"'
    )


def _entry(setting: Setting) -> dict[str, Any]:
    if setting.dense:
        return {"bits": 16}
    return {"bits": setting.bits, "group_size": _group(setting), "sym": setting.symmetric}


def _group(setting: Setting) -> int:
    return -1 if setting.group is None else setting.group
