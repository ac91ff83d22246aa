"""Finds the list of a decoder's blocks, also where a model has towers beside its text decoder."""

from typing import Any

from torch import nn

from evosweep.core.errors import ModelError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and ModuleList of the decoder's blocks: as many as the config says there are layers.

    Of a model with towers for images or sound, one of which may be as deep, it is the list inside the text decoder.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [(name, module) for name, module in lists.items() if len(module) == count]
    if not fitting:
        raise ModelError(
            f"{type(model).__name__}: none of its module lists ({', '.join(lists) or 'it has none'}) has the "
            f"{count} blocks that its config names"
        )
    inside = [found for found in fitting if found[0].startswith(_decoder_path(model))]
    if not inside and config is not model.config:
        raise ModelError(
            f"{type(model).__name__}: no text decoder was found around a module list of {count} blocks, only "
            f"{', '.join(name for name, _ in fitting)}; give the text model alone"
        )
    return (inside or fitting)[0]


def _decoder_path(model: Any) -> str:
    """Return the path of a model's text decoder with a dot behind it; an empty one where it is the model itself."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
