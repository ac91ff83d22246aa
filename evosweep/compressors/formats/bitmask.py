"""Unstructured sparsity: a mask of one bit a weight, and the kept weights in fp16, row by row."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.formats.grouped_int import pack, unpack
from evosweep.compressors.payload import Payload

VALUE_BITS = 16


def bits(*, numel: int, kept: int) -> int:
    """Return the exact size in bits: mask + kept weights."""
    return numel + kept * VALUE_BITS


def encode(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a sparse weight.

    Args:
        weight: Shape (rows, columns).
        mask: True where a weight is kept, same shape; a kept weight may be zero.
    """
    return {"mask": pack(mask, 1), "values": weight[mask].half()}


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: ``rows`` and ``columns``.
        parts: None; this format holds no other payload.
    """
    del parts
    rows = int(meta["rows"])
    columns = int(meta["columns"])
    mask = unpack(tensors["mask"], 1, rows * columns).bool()
    weight = torch.zeros(rows * columns, device=mask.device)
    weight[mask] = tensors["values"].float()
    return weight.view(rows, columns)
