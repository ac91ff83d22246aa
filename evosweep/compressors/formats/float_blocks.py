"""Small floating-point numbers in blocks, with scales of several kinds: FP4, FP6, FP8, MXFP4, NVFP4 and their like.

A number of an element format has one sign bit, then exponent, then mantissa, the highest bit first, as in the OCP
Microscaling Formats specification 1.0 (table 1) and NVIDIA's NVFP4; E4M3 is E4M3FN, without infinity. Codes are bit
planes as in ``grouped_int``. Exporters that pack two FP4 codes a byte put the first in the low half.

Scales, by kind:

    fp16     one 16-bit number a block.
    e8m0     one byte a block, the power of two 2^(byte − 127): MX formats, and ZeroQuant-FP's constraint M1.
    ratio    a 16-bit number a row and four bits k a block: row · 2^−k, ZeroQuant-FP's constraint M2.
    nvfp4    one E4M3 byte a block, and a 32-bit number a layer that multiplies it.
    fp32     one 32-bit number a block, as per-channel FP8 has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from evosweep.compressors.formats.grouped_int import pack, unpack
from evosweep.compressors.payload import Payload

RATIO_WIDTH = 4
MOST_RATIO = 2**RATIO_WIDTH - 1
E8M0_ZERO = 127
SCALE_BITS = {"fp16": 16, "e8m0": 8, "ratio": RATIO_WIDTH, "nvfp4": 8, "fp32": 32}  # a block


@dataclass(frozen=True)
class Element:
    """A floating-point format of few bits.

    Attributes:
        exponent: Bits of the exponent.
        mantissa: Bits of the mantissa.
        bias: Taken from the exponent's code.
        largest: Largest finite value.
    """

    exponent: int
    mantissa: int
    bias: int
    largest: float

    @property
    def bits(self) -> int:
        """Bits of a number, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal value; smaller values have its step."""
        return 1 - self.bias

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest value."""
        return int(torch.tensor(self.largest).log2().floor())


ELEMENTS = {
    "e2m1": Element(2, 1, 1, 6.0),
    "e3m0": Element(3, 0, 3, 16.0),
    "e2m3": Element(2, 3, 1, 7.5),
    "e3m2": Element(3, 2, 3, 28.0),
    "e4m3": Element(4, 3, 7, 448.0),
    "e5m2": Element(5, 2, 15, 57344.0),
}


def bits(*, rows: int, columns: int, element: str, block: int, scale: str) -> int:
    """Return the exact size in bits, bit planes rounded up to whole bytes.

    Args:
        rows: Output features.
        columns: Input features.
        element: Name of the numbers' format.
        block: Columns that share a scale.
        scale: Kind of the scales.
    """
    blocks = rows * (columns // block)
    codes = 8 * ELEMENTS[element].bits * -(-rows * columns // 8)
    if scale == "ratio":
        return codes + 16 * rows + 8 * RATIO_WIDTH * -(-blocks // 8)
    return codes + SCALE_BITS[scale] * blocks + (32 if scale == "nvfp4" else 0)


def rounded(
    values: torch.Tensor, *, mantissa: torch.Tensor, least: torch.Tensor, largest: torch.Tensor
) -> torch.Tensor:
    """Return the nearest numbers of a format, ties to the even mantissa, too large ones cut off; fp32, same shape.

    Args:
        values: Any shape.
        mantissa: Bits of the format's mantissa, broadcast against ``values``, fp32.
        least: Its ``least_exponent``.
        largest: Its largest value.
    """
    _, exponent = torch.frexp(values)  # of a fraction from 0.5: one more than that of the leading bit
    step = torch.exp2(torch.maximum(exponent - 1.0, least) - mantissa)
    return (values / step).round_().mul_(step).clamp_(min=-largest).minimum(largest)


@lru_cache
def table(element: str) -> torch.Tensor:
    """Return the value of every code of a format, fp32, shape (2^bits,); codes of no number are NaN."""
    kind = ELEMENTS[element]
    codes = torch.arange(2 ** (kind.bits - 1))
    exponent = codes >> kind.mantissa
    fraction = (codes & (2**kind.mantissa - 1)).float() / 2**kind.mantissa
    normal = torch.ldexp(1 + fraction, exponent - kind.bias)
    values = torch.where(exponent > 0, normal, torch.ldexp(fraction, torch.tensor(kind.least_exponent)))
    values = torch.where(values > kind.largest, torch.nan, values)
    return torch.cat([values, -values])


def codes_of(values: torch.Tensor, element: str) -> torch.Tensor:
    """Return the code of each number, uint8, same shape; every value is one of the format's."""
    known = table(element)[: 2 ** (ELEMENTS[element].bits - 1)].to(values.device)
    known = known[~known.isnan()]  # the last ones: what is left rises
    magnitude = torch.searchsorted(known, values.abs().contiguous())
    return torch.where(values < 0, magnitude + 2 ** (ELEMENTS[element].bits - 1), magnitude).to(torch.uint8)


def encode(*, values: torch.Tensor, scales: Mapping[str, torch.Tensor], element: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight.

    Args:
        values: Numbers of the element format, shape (rows, columns).
        scales: Tensors of the scales, as ``encode_scales`` gives them.
        element: Name of the format.
    """
    return {"codes": pack(codes_of(values, element), ELEMENTS[element].bits), **scales}


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns``, ``element``, ``block`` and ``scale``.
        parts: None; this format holds no other payload.
    """
    del parts
    rows, columns, block = (int(meta[key]) for key in ("rows", "columns", "block"))
    element = str(meta["element"])
    codes = unpack(tensors["codes"], ELEMENTS[element].bits, rows * columns)
    values = table(element).to(codes.device)[codes.long()].view(rows, columns // block, block)
    scales = decode_scales(tensors, str(meta["scale"]), rows=rows, blocks=columns // block)
    return (values * scales[:, :, None]).view(rows, columns)


def encode_scales(scales: torch.Tensor, kind: str, *, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of scales; their values are ones that the kind can hold.

    Args:
        scales: fp32, shape (rows, blocks).
        kind: Of the scales.
        whole: fp32: of ``nvfp4`` the layer's scale, shape (); of ``ratio`` the rows' scales, shape (rows,).
    """
    if kind == "fp16":
        return {"scales": scales.half()}
    if kind == "fp32":
        return {"scales": scales.float()}
    if kind == "e8m0":
        return {"scales": (scales.log2().round() + E8M0_ZERO).to(torch.uint8)}
    if kind == "ratio":
        ratios = (whole[:, None] / scales).log2().round().to(torch.uint8)
        return {"ratios": pack(ratios, RATIO_WIDTH), "scales": whole.half()}
    return {"scales": (scales / whole).to(torch.float8_e4m3fn).view(torch.uint8), "whole": whole.float().reshape(1)}


def decode_scales(tensors: Mapping[str, torch.Tensor], kind: str, *, rows: int, blocks: int) -> torch.Tensor:
    """Return the scales, fp32, shape (rows, blocks).

    Args:
        tensors: What ``encode_scales`` returned, among others.
        kind: Of the scales.
        rows: Output features.
        blocks: Scales a row.
    """
    stored = tensors["scales"]
    if kind == "e8m0":
        return torch.exp2(stored.float() - E8M0_ZERO)
    if kind == "ratio":
        ratios = unpack(tensors["ratios"], RATIO_WIDTH, rows * blocks).view(rows, blocks)
        return stored.float()[:, None] * torch.exp2(-ratios.float())
    if kind == "nvfp4":
        return stored.view(torch.float8_e4m3fn).float() * tensors["whole"].float()
    return stored.float()
