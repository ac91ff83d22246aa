"""A payload plus the product of two thin matrices, in fp16 or in int8 with one fp16 scale a rank.

The scale of a rank is that of its column on the left and of its row on the right alike.
"""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.payload import Payload

BASE = "base"
SCALE_BITS = 16
TOP = 127  # largest code of eight bits; codes are symmetric
LEAST = 2.0**-24  # smallest positive fp16


def bits(*, rows: int, columns: int, rank: int, factor_bits: int) -> int:
    """Return the exact size of both factors in bits, scales included.

    Args:
        rows: Output features.
        columns: Input features.
        rank: Columns of the left factor.
        factor_bits: 16 or 8.
    """
    return rank * (factor_bits * (rows + columns) + (SCALE_BITS if factor_bits == 8 else 0))


def encode(left: torch.Tensor, right: torch.Tensor, *, factor_bits: int) -> dict[str, torch.Tensor]:
    """Return the stored tensors of factors, for one matrix or many.

    The largest value of every rank is made the same on both sides first, so that neither leaves the range of fp16.

    Args:
        left: Shape (..., rows, rank).
        right: Shape (..., rank, columns).
        factor_bits: 16 or 8.
    """
    tall = left.abs().amax(dim=-2).clamp(min=LEAST)
    wide = right.abs().amax(dim=-1).clamp(min=LEAST)
    balance = (wide / tall).sqrt()
    left = left * balance[..., None, :]
    right = right / balance[..., :, None]
    if factor_bits == 16:
        return {"left": left.half(), "right": right.half()}
    scales = ((wide * tall).sqrt() / TOP).half().clamp(min=LEAST)
    step = scales.float()
    return {
        "left": (left / step[..., None, :]).round_().clamp_(-TOP, TOP).to(torch.int8),
        "right": (right / step[..., :, None]).round_().clamp_(-TOP, TOP).to(torch.int8),
        "scales": scales,
    }


def factors(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp32 factors, (..., rows, rank) and (..., rank, columns), of what ``encode`` returned."""
    left = tensors["left"].float()
    right = tensors["right"].float()
    if "scales" in tensors:
        scales = tensors["scales"].float()
        left = left * scales[..., None, :]
        right = right * scales[..., :, None]
    return left, right


def first_ranks(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Return the stored tensors of the first ranks of one matrix's factors."""
    first = {"left": tensors["left"][:, :rank], "right": tensors["right"][:rank]}
    if "scales" in tensors:
        first["scales"] = tensors["scales"][:rank]
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in first.items()}


def decode(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload]) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: Nothing.
        parts: The payload to which the product is added, under ``base``.
    """
    del meta
    left, right = factors(tensors)
    return torch.addmm(parts[BASE].weight, left, right)
