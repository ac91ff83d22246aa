"""Integer codes in groups of columns, each with an fp16 scale and (asymmetric) an integer zero.

Codes of any width are kept as bit planes: plane i holds bit i of every code, eight codes a byte, so that a code
of b bits takes exactly b bits. Zeros are packed the same way. Dequantized: (code - zero) * scale.
"""

from collections.abc import Mapping

import torch

SCALE_BITS = 16
ONES, GATHER, DIAGONAL, CARRY = (
    int.from_bytes(bytes(each), "little", signed=True)
    for each in (
        [1] * 8,
        [1 << (7 - place) for place in range(8)],
        [1 << place for place in range(8)],
        [0x80 - (1 << place) for place in range(8)],
    )
)


def bits(*, rows: int, columns: int, width: int, group: int, symmetric: bool) -> int:
    """Return the exact size in bits: codes + scales + zeros.

    Args:
        rows: Output features.
        columns: Input features.
        width: Bits a code.
        group: Columns a group.
        symmetric: Whether the zero is the middle code and so not stored.
    """
    groups = rows * (columns // group)
    return rows * columns * width + groups * (SCALE_BITS + (0 if symmetric else width))


def encode(
    *, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, width: int
) -> dict[str, torch.Tensor]:
    """Pack a quantized weight.

    Args:
        codes: uint8, any shape, below 2^width.
        scales: fp16, shape (rows, groups).
        zeros: uint8, shape (rows, groups), or None for the middle code 2^(width-1).
        width: Bits a code.
    """
    parts = {"codes": pack(codes, width), "scales": scales.half().contiguous()}
    if zeros is not None:
        parts["zeros"] = pack(zeros, width)
    return parts


def decode(parts: Mapping[str, torch.Tensor], meta: Mapping[str, int]) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        parts: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns``, ``width`` and ``group``.
    """
    rows, columns, width, group = (int(meta[key]) for key in ("rows", "columns", "width", "group"))
    groups = columns // group
    codes = unpack(parts["codes"], width, rows * columns).view(rows, groups, group)
    scales = parts["scales"].float().view(rows, groups, 1)
    if "zeros" in parts:
        zeros = unpack(parts["zeros"], width, rows * groups).view(rows, groups, 1).float()
    else:
        zeros = torch.full((1, 1, 1), float(2 ** (width - 1)), device=codes.device)
    return ((codes.float() - zeros) * scales).view(rows, columns)


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack codes below 2^width into bit planes, uint8 of shape (width, ceil(codes / 8)).

    Eight codes are one 64-bit word. Of a word with a bit in each byte, multiplying by ``GATHER`` brings them together
    in the top byte, the first code's lowest.
    """
    flat = codes.reshape(-1).to(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    planes = [(((((words >> bit) & ONES) * GATHER) >> 56) & 255).to(torch.uint8) for bit in range(width)]
    return torch.stack(planes)


def unpack(planes: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Return the first ``count`` codes of bit planes, uint8, shape (count,).

    A byte eight times in a word, of which byte i keeps its bit i; what is added carries that bit to the byte's top.
    """
    words = torch.zeros(planes.shape[1], dtype=torch.int64, device=planes.device)
    for bit in range(width):
        words |= (((((planes[bit].to(torch.int64) * ONES) & DIAGONAL) + CARRY) >> 7) & ONES) << bit
    return words.view(torch.uint8)[:count]
