"""Small floating-point numbers in blocks, with scales of several kinds: FP4, FP6, FP8, MXFP4, NVFP4 and their like.

A number of an element format has one sign bit, then exponent, then mantissa, the highest bit first, as in the OCP
Microscaling Formats specification 1.0 (table 1) and NVIDIA's NVFP4; E4M3 is E4M3FN, without infinity: the codes of the
8-bit formats are torch's bit patterns. Rounding is to the nearest number, ties to the even mantissa, and too large
values become the largest. Codes are stored as bit planes, as in ``grouped_int``.

Scales, by kind:

    fp16     one 16-bit number a block.
    e8m0     one byte a block, the power of two 2^(byte − 127): MX formats, and ZeroQuant-FP's constraint M1.
    ratio    a 16-bit number a row and four bits k a block: row · 2^−k, ZeroQuant-FP's constraint M2.
    nvfp4    one E4M3 byte a block, and a 32-bit number a layer that multiplies it.
    fp32     one 32-bit number a block, as per-channel FP8 has.
    layer    one 32-bit number a layer, as per-tensor FP8 has.

What compressed-tensors holds for the same weight, value for value (tests/compressors/test_floating.py decodes with it):

    nvfp4-pack-quantized   ``weight_packed``: two E2M1 codes a byte, the column with the lower index in the low half;
                           ``weight_scale``: ``scales`` viewed as float8_e4m3fn; ``weight_global_scale``: 1 / ``whole``.
    mxfp4-pack-quantized   ``weight_packed`` likewise; ``weight_scale``: ``scales`` as they are, uint8.
    float-quantized        ``weight``: the codes of E4M3 viewed as float8_e4m3fn; ``weight_scale``: ``scales``, shape
                           (rows, 1) for a scale a row, (1,) for a scale a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from evosweep.compressors.formats.grouped_int import pack, unpack
from evosweep.compressors.payload import Payload

RATIO_WIDTH = 4
MOST_RATIO = 2**RATIO_WIDTH - 1
E8M0_ZERO = 127
SCALE_BITS = {"fp16": 16, "e8m0": 8, "nvfp4": 8, "fp32": 32}  # a block
EXPONENT = 0x7F800000  # of an fp32 number
FRACTION = 23  # bits of its mantissa


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
    if scale == "layer":
        return codes + 32
    return codes + SCALE_BITS[scale] * blocks + (32 if scale == "nvfp4" else 0)


@dataclass(frozen=True)
class Limits:
    """What rounding needs to know of each row's format, fp32, shape (rows,).

    Attributes:
        least: Smallest normal number.
        spread: 1.5 · 2^(23 − bits of the mantissa). Times the power of two below a value it is a number so large that
            fp32 has no digits left, when the value is added, below the last one of the format.
        largest: Largest number.
    """

    least: torch.Tensor
    spread: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(cls, elements: Sequence[str], sizes: Sequence[int], device: torch.device) -> "Limits":
        """Return the limits of the rows of several matrices.

        Args:
            elements: Name of each matrix's format.
            sizes: Rows of each matrix.
            device: Where they are needed.
        """
        kinds = [ELEMENTS[name] for name in elements]
        rows = [(2.0**kind.least_exponent, 1.5 * 2.0 ** (FRACTION - kind.mantissa), kind.largest) for kind in kinds]
        least, spread, largest = torch.tensor(rows).repeat_interleave(torch.tensor(sizes), dim=0).T.contiguous()
        return cls(least.to(device), spread.to(device), largest.to(device))


def power_of_two_below(values: torch.Tensor) -> torch.Tensor:
    """Return the largest power of two that is no larger than each value's size, exact; fp32, same shape.

    Args:
        values: fp32; where one is smaller than 2^−126, the result is 0.
    """
    return values.contiguous().view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)


def rounded(values: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Return the nearest numbers of a format, ties to the even mantissa, too large ones cut off; fp32, same shape.

    Args:
        values: fp32, the last dimension that of the limits.
        limits: Of the format.
    """
    digits = torch.maximum(power_of_two_below(values), limits.least).mul_(limits.spread)
    return values.add(digits).sub_(digits).clamp_(min=-limits.largest, max=limits.largest)


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
        whole: fp32: of ``nvfp4`` and ``layer`` the layer's scale, shape (); of ``ratio`` the rows', shape (rows,).
    """
    if kind == "fp16":
        return {"scales": scales.half()}
    if kind in ("fp32", "layer"):
        return {"scales": scales.float() if kind == "fp32" else whole.float().reshape(1)}
    if kind == "e8m0":
        return {"scales": (scales.log2().round() + E8M0_ZERO).to(torch.uint8)}
    if kind == "ratio":
        ratios = (whole[:, None] / scales).log2().round().to(torch.uint8)
        return {"ratios": pack(ratios, RATIO_WIDTH), "scales": whole.half()}
    return {"scales": (scales / whole).to(torch.float8_e4m3fn).view(torch.uint8), "whole": whole.float().reshape(1)}


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^(byte − 127) for bytes below 255, exact, fp32, same shape."""
    bits_of = torch.where(exponents == 0, 1 << (FRACTION - 1), exponents.int() << FRACTION)  # 2^−127 is subnormal
    return bits_of.int().view(torch.float32)


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
        return power_of_two(stored)
    if kind == "ratio":
        ratios = unpack(tensors["ratios"], RATIO_WIDTH, rows * blocks).view(rows, blocks)
        return stored.float()[:, None] * power_of_two(E8M0_ZERO - ratios.int())
    if kind == "nvfp4":
        return stored.view(torch.float8_e4m3fn).float() * tensors["whole"].float()
    return stored.float().expand(rows, blocks)
