"""Where the blocks of a model's text decoder are."""

from typing import Any

from torch import nn

from evosweep.core.errors import ModelError

LISTS_SHOWN = 6  # in a message


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and ModuleList of the decoder's blocks: as many as the config says there are layers.

    Of a model with towers for images or sound, one of which may be as deep, it is the list inside the text decoder.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Where a block holds two layers, the number of blocks has another name than that of layers.
    counts = [getattr(config, key) for key in ("num_hidden_layers", "num_layers") if hasattr(config, key)]
    by_count = ([(name, module) for name, module in lists.items() if len(module) == count] for count in counts)
    fitting = next((found for found in by_count if found), [])
    if not fitting:
        shown = ", ".join(list(lists)[:LISTS_SHOWN]) + (" ..." if len(lists) > LISTS_SHOWN else "")
        raise ModelError(
            f"{type(model).__name__}: none of its module lists ({shown or 'it has none'}) has the "
            f"{counts[0] if counts else None} blocks that its config names"
        )
    inside = [found for found in fitting if found[0].startswith(_decoder_path(model))]
    if not inside and config is not model.config:
        raise ModelError(
            f"{type(model).__name__}: no text decoder was found around a module list of {counts[0]} blocks, only "
            f"{', '.join(name for name, _ in fitting)}; give the text model alone"
        )
    return (inside or fitting)[0]


def _decoder_path(model: Any) -> str:
    """Return the path of a model's text decoder with a dot behind it; an empty one where it is the model itself."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
