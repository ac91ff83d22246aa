"""Integer codes in groups of columns, each with an fp16 scale and (asymmetric) an integer zero.

Codes of any width are stored as bit planes: plane i holds bit i of every code, eight codes a byte, so that a code
of b bits takes exactly b bits. Zeros are packed the same way. Dequantized: (code - zero) * scale.

Packing and unpacking work on eight codes at once, one a byte of a 64-bit word (SWAR), by multiplication with constants.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from evosweep.compressors.payload import Payload

SCALE_BITS = 16


def _word(values: Iterable[int]) -> int:
    """Return eight bytes, the lowest first, as the signed 64-bit number that torch calculates with."""
    return int.from_bytes(bytes(values), "little", signed=True)


ONES = _word([1] * 8)  # the lowest bit of every byte
GATHER = _word(1 << (7 - byte) for byte in range(8))  # times a word of 0/1 bytes: their bits in the top byte
DIAGONAL = _word(1 << byte for byte in range(8))  # bit i of byte i
CARRY = _word(0x80 - (1 << byte) for byte in range(8))  # added to the diagonal: a set bit carries to its byte's top


def bits(*, rows: int, columns: int, width: int, group: int, symmetric: bool) -> int:
    """Return the exact size in bits: codes + scales + zeros.

    Args:
        rows: Output features.
        columns: Input features.
        width: Bits a code.
        group: Columns a group.
        symmetric: Whether the zero is the middle code, which is not stored.
    """
    groups = rows * (columns // group)
    return rows * columns * width + groups * (SCALE_BITS + (0 if symmetric else width))


def encode(
    *, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, width: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantized weight.

    Args:
        codes: uint8, any shape, below 2^width.
        scales: fp16, shape (rows, groups).
        zeros: uint8, shape (rows, groups), or None for the middle code 2^(width-1).
        width: Bits a code.
    """
    tensors = {"codes": pack(codes, width), "scales": scales.half().contiguous()}
    if zeros is not None:
        tensors["zeros"] = pack(zeros, width)
    return tensors


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns``, ``width`` and ``group``.
        parts: None; this format holds no other payload.
    """
    del parts
    rows, columns, width, group = (int(meta[key]) for key in ("rows", "columns", "width", "group"))
    groups = columns // group
    codes = unpack(tensors["codes"], width, rows * columns).view(rows, groups, group)
    scales = tensors["scales"].float().view(rows, groups, 1)
    if "zeros" in tensors:
        zeros = unpack(tensors["zeros"], width, rows * groups).view(rows, groups, 1).float()
    else:
        zeros = torch.full((1, 1, 1), float(2 ** (width - 1)), device=codes.device)
    return ((codes.float() - zeros) * scales).view(rows, columns)


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes below 2^width as bit planes, uint8 of shape (width, ceil(codes / 8)).

    The first of eight codes is the lowest bit of a plane's byte.

    Args:
        codes: Any shape; read in its order.
        width: Bits a code.
    """
    flat = codes.reshape(-1).to(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    planes = [(((((words >> bit) & ONES) * GATHER) >> 56) & 255).to(torch.uint8) for bit in range(width)]
    return torch.stack(planes)


def unpack(planes: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Return the first ``count`` codes of bit planes, uint8, shape (count,).

    A plane's byte is copied into all eight bytes of a word; byte i keeps its bit i, which a carry moves to the byte's
    top and a shift to its bottom.

    Args:
        planes: What ``pack`` returned, shape (width, bytes).
        width: Bits a code.
        count: Codes wanted; those behind them are padding.
    """
    words = torch.zeros(planes.shape[1], dtype=torch.int64, device=planes.device)
    for bit in range(width):
        words |= (((((planes[bit].to(torch.int64) * ONES) & DIAGONAL) + CARRY) >> 7) & ONES) << bit
    return words.view(torch.uint8)[:count]
