"""Codes that look their value up in a table of fp16 values: one table a row, or one a layer with a scale a row."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.formats.grouped_int import pack, unpack
from evosweep.compressors.payload import Payload

VALUE_BITS = 16


def bits(*, rows: int, columns: int, width: int, by_row: bool) -> int:
    """Return the exact size in bits: codes + tables + scales.

    Args:
        rows: Output features.
        columns: Input features.
        width: Bits a code.
        by_row: Whether each row has its table; else one table and a scale a row.
    """
    values = rows * 2**width if by_row else rows + 2**width
    return 8 * width * -(-rows * columns // 8) + VALUE_BITS * values


def encode(
    *, codes: torch.Tensor, tables: torch.Tensor, scales: torch.Tensor | None, width: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantized weight.

    Args:
        codes: Indices into the tables, uint8, shape (rows, columns).
        tables: Values of fp16, shape (rows or 1, 2^width).
        scales: Values of fp16, shape (rows,); None with a table a row.
        width: Bits a code.
    """
    tensors = {"codes": pack(codes, width), "tables": tables.half().contiguous()}
    return tensors if scales is None else tensors | {"scales": scales.half().contiguous()}


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns`` and ``width``.
        parts: None; this format holds no other payload.
    """
    del parts
    rows, columns, width = (int(meta[key]) for key in ("rows", "columns", "width"))
    codes = unpack(tensors["codes"], width, rows * columns).view(rows, columns).long()
    values = tensors["tables"].float().expand(rows, -1).gather(1, codes)
    return values * tensors["scales"].float()[:, None] if "scales" in tensors else values
