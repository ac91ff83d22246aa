"""Ternary codes, five a byte (1.6 bits each), and fp16 scales: one a tensor, a row or a group of columns."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.formats.grouped_int import SCALE_BITS
from evosweep.compressors.payload import Payload

A_BYTE = 5  # codes: 3⁵ = 243


def bits(*, rows: int, columns: int, scales: int) -> int:
    """Return the exact size in bits: codes + scales.

    Args:
        rows: Output features.
        columns: Input features.
        scales: Their number.
    """
    return 8 * -(-rows * columns // A_BYTE) + SCALE_BITS * scales


def encode(*, codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a ternary weight.

    Args:
        codes: 0, 1 and 2 for −1, 0 and 1, shape (rows, columns).
        scales: Values of fp16, shape (rows, groups), or (1, 1) for the tensor.
    """
    flat = codes.reshape(-1).int()
    digits = torch.nn.functional.pad(flat, (0, -len(flat) % A_BYTE)).view(-1, A_BYTE)
    powers = 3 ** torch.arange(A_BYTE, device=flat.device, dtype=torch.int32)
    return {"codes": (digits * powers).sum(dim=1).to(torch.uint8), "scales": scales.half().contiguous()}


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
    scales = tensors["scales"].float()
    powers = 3 ** torch.arange(A_BYTE, device=scales.device, dtype=torch.int32)
    digits = tensors["codes"].int()[:, None] // powers % 3 - 1
    signs = digits.flatten()[: rows * columns].float()
    if len(scales) == 1:
        return (signs * scales).view(rows, columns)
    return (signs.view(rows, scales.shape[1], -1) * scales[:, :, None]).view(rows, columns)
