"""Lists of EvoPress's own scripts: a line a layer with its level, or a line a block with what is dropped."""

from evosweep.core.allocation_text import format_drops, format_genome
from evosweep.core.errors import EvosweepError
from evosweep.exporters.recipes.listing import Listing, Setting

NAME = "EvoPress"
LEVELS = "evopress.txt"
DROPS = "layer_drop_config.txt"


def refusal(setting: Setting, family: str) -> str:
    """Return nothing: a list names any level.

    Args:
        setting: Not read.
        family: Not read.
    """
    del setting, family
    return ""


def files(listing: Listing) -> dict[str, str]:
    """Return the list of levels, by numbers where these differ, and the list of drops where nothing else is searched.

    Sparsities are steps from the uniform level, as in EvoPress.
    """
    if all(unit.only_drops for unit in listing.problem.units):
        return {DROPS: format_drops(listing.genome, listing.problem)}
    kinds = {level.nominal.kind for unit in listing.problem.units for level in unit.levels if level.nominal}
    try:
        text = format_genome(listing.genome, listing.problem, style="steps" if kinds == {"sparsity"} else "bits")
    except EvosweepError:
        text = format_genome(listing.genome, listing.problem)
    return {LEVELS: text}


def command(listing: Listing) -> str:
    """Return the command that measures the allocation with EvoPress's scripts, and the one that starts a search."""
    name = next(iter(files(listing)))
    options = {
        DROPS: f"--drop_layer_config {DROPS}",
        LEVELS: f"--quant_weights_path <levels of EvoPress> --quant_config_path {LEVELS}",
    }
    return (
        f"python eval_ppl.py --model_name_or_path {listing.model} {options[name]}   # EvoPress\n"
        f"python -m evosweep sampler=evopress sampler.start={name}   # evosweep"
    )
