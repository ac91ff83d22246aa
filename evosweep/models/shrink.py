"""A model with parts left out, as it is written to disk."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from evosweep.models.anatomy import Anatomy, Site


@contextmanager
def without_blocks(anatomy: Anatomy, gone: Collection[int]) -> Iterator[None]:
    """Take whole blocks out of the model and its config for a while; what is left is numbered anew."""
    if not gone:
        yield
        return
    model: Any = anatomy.model
    config = model.config.get_text_config()
    count = len(anatomy.blocks)
    kept = [index for index in range(count) if index not in gone]
    parent, _, name = anatomy.block_path.rpartition(".")
    around = model.get_submodule(parent)
    # layer_types and the like: one entry a block
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    setattr(around, name, nn.ModuleList([anatomy.blocks[index] for index in kept]))
    config.num_hidden_layers = len(kept)
    for key, value in lists.items():
        setattr(config, key, [value[index] for index in kept])
    try:
        yield
    finally:
        setattr(around, name, anatomy.blocks)
        config.num_hidden_layers = count
        for key, value in lists.items():
            setattr(config, key, value)


@contextmanager
def zeroed(sites: Sequence[Site]) -> Iterator[None]:
    """Let layers be all zeros, bias too, for a while: nothing of their sub-block joins the residual stream."""
    tensors = [parameter for site in sites for parameter in site.module.parameters(recurse=False)]
    before = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
