"""How much attention every token receives in a block, from the block's own queries and keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evosweep.core.errors import ModelError
from evosweep.models.anatomy import Anatomy

NAME = "evosweep_attention_received"  # of the attention function that is registered for a moment
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}


class _AttentionReached(Exception):
    """Ends a block's forward pass: what follows its attention is not needed."""


def attention_received(
    anatomy: Anatomy, block: int, hidden: torch.Tensor | None, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention that every token receives in a block, summed over heads and queries, fp32.

    The probabilities are those of the model's own attention, read where transformers hands queries and keys to its
    attention function; they are summed a part of the queries at a time, so that no whole matrix is kept.

    Args:
        anatomy: The model.
        block: Index of the block.
        hidden: The block's inputs, shape (windows, seq_len, hidden).
        tokens: Their token ids (windows, seq_len), which some models' blocks need.

    Returns:
        Shape (windows, seq_len).

    Raises:
        ModelError: The block's attention cannot be read: it does not use transformers' attention functions, or the
            blocks cannot be run one by one.
    """
    if hidden is None:
        raise ModelError(f"the blocks of {type(anatomy.model).__name__} cannot be run one by one")
    found: list[torch.Tensor] = []

    def receive(module: nn.Module, *args: Any, **settings: Any) -> Any:
        query, key, _, mask = args
        found.append(_received(module, query, key, mask, settings))
        raise _AttentionReached

    anatomy.prepare(hidden.shape[1], tokens)
    with _attention_function(anatomy.blocks[block], receive), suppress(_AttentionReached):
        anatomy.run_block(block, hidden, tokens)
    if not found or found[0].shape != hidden.shape[:2]:
        raise ModelError(f"the attention of block {block} of {type(anatomy.model).__name__} cannot be read")
    return found[0]


@contextmanager
def _attention_function(block: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a block's attention modules call a function of ours while the context lasts."""
    found: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS[NAME] = function
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del ALL_ATTENTION_FUNCTIONS[NAME]


def _received(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, settings: dict[str, Any]
) -> torch.Tensor:
    """Return the sums over heads and queries of softmax(QKᵀ), shape (windows, keys).

    Args:
        module: The attention module.
        query: Shape (windows, heads, queries, head_dim).
        key: Shape (windows, key heads, keys, head_dim).
        mask: Added to scores, or True where a token may be attended to; None: causal.
        settings: What the module hands to its attention function beside.

    Raises:
        ModelError: Its scores are more than products of queries and keys.
    """
    if getattr(module, "sinks", None) is not None or settings.get("position_bias") is not None:
        raise ModelError(f"the attention of {type(module).__name__} has sinks or biases of its own and cannot be read")
    windows, heads, queries, width = query.shape
    keys = key.shape[2]
    scaling = settings.get("scaling")
    scaling = width**-0.5 if scaling is None else scaling
    softcap = settings.get("softcap")
    total = torch.zeros((windows, keys), device=query.device)
    at_once = max(1, SCORES_AT_ONCE.get(query.device.type, 2**22) // (heads * keys))
    step = min(queries, at_once)
    window_step = max(1, at_once // step)
    position = torch.arange(keys, device=query.device)
    for first in range(0, windows, window_step):
        part = slice(first, first + window_step)
        ours = key[part].float().repeat_interleave(heads // key.shape[1], dim=1).mT
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            scores = (query[part, :, rows].float() @ ours) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            allowed = position <= position[rows, None] if mask is None else _part_of(mask, part, rows, keys)
            scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
            total[part] += scores.softmax(dim=-1).sum(dim=(1, 2))
    return total


def _part_of(mask: torch.Tensor, windows: slice, rows: slice, keys: int) -> torch.Tensor:
    """Return a mask (windows or 1, heads or 1, queries, keys) of some windows and queries."""
    return (mask if mask.shape[0] == 1 else mask[windows])[:, :, rows, :keys]
