"""Sparse integers: one bit a weight that says whether it is kept, codes of those kept, scales and zeros of groups.

Codes and zeros lie in bit planes as in ``grouped_int``; the kept codes follow each other row by row.
"""

from collections.abc import Mapping

import torch

from evosweep.compressors.formats import grouped_int
from evosweep.compressors.formats.grouped_int import SCALE_BITS, pack, unpack


def bits(*, rows: int, columns: int, kept: int, width: int, group: int, symmetric: bool) -> int:
    """Return the exact size in bits: mask + kept codes, each of their planes in whole bytes, + scales + zeros.

    Args:
        rows: Output features.
        columns: Input features.
        kept: Weights that are kept.
        width: Bits a code.
        group: Columns a group.
        symmetric: Whether the zero is the middle code and so not stored.
    """
    groups = rows * (columns // group)
    zeros = 0 if symmetric else _planes(groups, width)
    return _planes(rows * columns, 1) + _planes(kept, width) + groups * SCALE_BITS + zeros


def encode(
    *, codes: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, width: int
) -> dict[str, torch.Tensor]:
    """Pack a weight that is both sparse and quantized.

    Args:
        codes: uint8, shape (rows, columns), below 2^width.
        mask: True where a weight is kept, same shape.
        scales: fp16, shape (rows, groups).
        zeros: uint8, shape (rows, groups), or None for the middle code 2^(width-1).
        width: Bits a code.
    """
    return {"mask": pack(mask, 1), **grouped_int.encode(codes=codes[mask], scales=scales, zeros=zeros, width=width)}


def decode(parts: Mapping[str, torch.Tensor], meta: Mapping[str, int]) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        parts: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns``, ``kept``, ``width`` and ``group``.
    """
    rows, columns, kept, width, group = (int(meta[key]) for key in ("rows", "columns", "kept", "width", "group"))
    groups = columns // group
    mask = unpack(parts["mask"], 1, rows * columns).bool()
    if "zeros" in parts:
        zeros = unpack(parts["zeros"], width, rows * groups).float()
    else:
        zeros = torch.full((rows * groups,), float(2 ** (width - 1)), device=mask.device)
    weight = zeros.repeat_interleave(group)  # what is not kept stands at its zero
    weight[mask] = unpack(parts["codes"], width, kept).float()
    scaled: torch.Tensor = (weight.view(-1, group) - zeros[:, None]) * parts["scales"].float().view(-1, 1)
    return scaled.view(rows, columns)


def _planes(codes: int, width: int) -> int:
    return width * 8 * -(-codes // 8)
