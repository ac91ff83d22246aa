"""Unstructured sparsity: one bit a weight that says whether it is kept, and the kept weights in fp16, row by row."""

from collections.abc import Mapping

import torch

from evosweep.compressors.formats.grouped_int import pack, unpack

VALUE_BITS = 16


def bits(*, numel: int, kept: int) -> int:
    """Return the exact size in bits: mask + kept weights."""
    return numel + kept * VALUE_BITS


def encode(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack a sparse weight.

    Args:
        weight: Shape (rows, columns).
        mask: True where it is kept, same shape; a kept weight may be zero.
    """
    return {"mask": pack(mask, 1), "values": weight[mask].half()}


def decode(parts: Mapping[str, torch.Tensor], meta: Mapping[str, int]) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        parts: What ``encode`` returned, on any one device.
        meta: ``rows`` and ``columns``.
    """
    rows, columns = int(meta["rows"]), int(meta["columns"])
    mask = unpack(parts["mask"], 1, rows * columns).bool()
    weight = torch.zeros(rows * columns, device=mask.device)
    weight[mask] = parts["values"].float()
    return weight.view(rows, columns)
