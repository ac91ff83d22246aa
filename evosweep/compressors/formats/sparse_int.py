"""Sparse integers: a mask of one bit a weight, the codes of kept weights, and the scales and zeros of groups.

Codes and zeros are bit planes as in ``grouped_int``; kept codes are stored row by row, without gaps.
"""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.formats import grouped_int
from evosweep.compressors.formats.grouped_int import SCALE_BITS, pack, unpack
from evosweep.compressors.payload import Payload


def bits(*, rows: int, columns: int, kept: int, width: int, group: int, symmetric: bool) -> int:
    """Return the exact size in bits: mask + kept codes + scales + zeros, every bit plane rounded up to whole bytes.

    Args:
        rows: Output features.
        columns: Input features.
        kept: Weights that are kept.
        width: Bits a code.
        group: Columns a group.
        symmetric: Whether the zero is the middle code, which is not stored.
    """
    groups = rows * (columns // group)
    zeros = 0 if symmetric else _planes(groups, width)
    return _planes(rows * columns, 1) + _planes(kept, width) + groups * SCALE_BITS + zeros


def encode(
    *, codes: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, width: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight that is both sparse and quantized.

    Args:
        codes: uint8, shape (rows, columns), below 2^width.
        mask: True where a weight is kept, same shape.
        scales: fp16, shape (rows, groups).
        zeros: uint8, shape (rows, groups), or None for the middle code 2^(width-1).
        width: Bits a code.
    """
    return {"mask": pack(mask, 1), **grouped_int.encode(codes=codes[mask], scales=scales, zeros=zeros, width=width)}


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns``, ``kept``, ``width`` and ``group``.
        parts: None; this format holds no other payload.
    """
    del parts
    rows, columns, kept, width, group = (int(meta[key]) for key in ("rows", "columns", "kept", "width", "group"))
    groups = columns // group
    mask = unpack(tensors["mask"], 1, rows * columns).bool()
    if "zeros" in tensors:
        zeros = unpack(tensors["zeros"], width, rows * groups).float()
    else:
        zeros = torch.full((rows * groups,), float(2 ** (width - 1)), device=mask.device)
    weight = zeros.repeat_interleave(group)  # a removed weight gets its group's zero, and so decodes to 0
    weight[mask] = unpack(tensors["codes"], width, kept).float()
    scaled: torch.Tensor = (weight.view(-1, group) - zeros[:, None]) * tensors["scales"].float().view(-1, 1)
    return scaled.view(rows, columns)


def _planes(codes: int, width: int) -> int:
    """Return the bits of so many codes as bit planes."""
    return width * 8 * -(-codes // 8)
