"""Weights as llama.cpp stores them: blocks of a ggml type, byte for byte, or 16-bit numbers."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.formats.ggml_layout import TYPES, unpack
from evosweep.compressors.payload import Payload

PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PLAIN_NUMBERS = {"F32": 0, "F16": 1, "BF16": 30}
"""Numbers of these types in ``ggml_type``; in ``llama_ftype`` they are 0, 1 and 32."""


def bits(*, rows: int, columns: int, kind: str) -> int:
    """Return the exact size in bits.

    Args:
        rows: Output features.
        columns: Input features, a multiple of the type's block.
        kind: Name of the type.
    """
    if kind in PLAIN:
        return rows * columns * PLAIN[kind].itemsize * 8
    return 8 * rows * TYPES[kind].row_bytes(columns)


def encode(stored: torch.Tensor, kind: str) -> Payload:
    """Return the payload of a matrix.

    Args:
        stored: The rows' blocks, uint8, shape (rows, bytes); for 16-bit types the weight, shape (rows, columns).
        kind: Name of the type.
    """
    if kind in PLAIN:
        columns = stored.shape[1]
        stored = stored.to(PLAIN[kind]).contiguous().view(torch.uint8)
    else:
        columns = stored.shape[1] // TYPES[kind].size * TYPES[kind].block
    return Payload(__name__, {"blocks": stored}, {"type": kind, "rows": len(stored), "columns": columns})


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns), as ggml dequantizes it.

    Args:
        tensors: ``blocks``: uint8, shape (rows, bytes).
        meta: ``type``, ``rows`` and ``columns``.
        parts: None; this format holds no other payload.
    """
    del parts
    kind = meta["type"]
    rows, columns = (int(meta[key]) for key in ("rows", "columns"))
    stored = tensors["blocks"]
    if kind in PLAIN:
        return stored.contiguous().view(PLAIN[kind]).view(rows, columns).float()
    blocks = unpack(stored.reshape(-1, TYPES[kind].size), kind)
    return blocks.weights(TYPES[kind]).view(rows, columns)
