"""The block types of ggml: how many weights a block has, its scales and codes, and where each bit stands.

The layouts are those of ``ggml-common.h`` and ``dequantize_row_*`` in ``ggml-quants.c`` of llama.cpp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Field:
    """Where some bits of every code stand: byte ``[chunk, run]`` holds code ``[chunk, part, run]`` at part · width.

    Attributes:
        low: The lowest bit of a code that is stored here.
        width: Bits of a code.
        run: Bytes that follow one another with the same parts of a chunk.
    """

    low: int
    width: int
    run: int

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the bytes of codes (blocks, numbers), uint8, shape (blocks, numbers · width / 8)."""
        parts = 8 // self.width
        bits = ((codes.int() >> self.low) & (2**self.width - 1)).unflatten(1, (-1, parts, self.run))
        shifts = torch.arange(parts, device=codes.device, dtype=torch.int32)[:, None] * self.width
        return (bits << shifts).sum(dim=2).to(torch.uint8).flatten(1)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the part of codes (blocks, numbers) that bytes (blocks, bytes) hold, int32."""
        parts = 8 // self.width
        shifts = torch.arange(parts, device=stored.device, dtype=torch.int32)[:, None] * self.width
        bits = (stored.int().unflatten(1, (-1, 1, self.run)) >> shifts) & (2**self.width - 1)
        return bits.flatten(1) << self.low


@dataclass(frozen=True)
class BlockType:
    """A type of ggml. A weight is scale · (code − zero), scale · value of the code, or scale · code − minimum.

    Attributes:
        number: Its number in ``ggml_type``.
        file_type: Number of the file type that is named after it, ``llama_ftype``.
        block: Weights a block.
        size: Bytes a block.
        top: Largest code.
        zero: Code that stands for 0, or None where there are minima or values.
        codes: Where codes stand.
        order: What follows what in a block: ``d`` and ``m`` (fp16), ``q`` with the index of a field, ``scales``.
        part: Weights that share a scale.
        scales: Smallest and largest whole number that a part's scale is a multiple of ``d`` by; None: it is ``d``.
        minima: Whether there are minima: multiples of ``m`` as scales are of ``d``; without ``scales``, m is added.
        values: What codes stand for, if not themselves.
    """

    number: int
    file_type: int
    block: int
    size: int
    top: int
    zero: int | None
    codes: tuple[Field, ...]
    order: tuple[str, ...]
    part: int
    scales: tuple[int, int] | None = None
    minima: bool = False
    values: tuple[int, ...] | None = None

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / self.block

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of so many weights, a multiple of ``block``."""
        return columns // self.block * self.size


def _small(number: int, file_type: int, width: int, *, minima: bool = False) -> BlockType:
    """Return a type with blocks of 32 and one scale: Q4_0, Q4_1, Q5_0, Q5_1."""
    fields = (Field(0, 4, 16), Field(4, 1, 1))[: width - 3]
    order = ("d", *(("m",) if minima else ()), *(("q1",) if width > 4 else ()), "q0")
    return BlockType(
        number=number,
        file_type=file_type,
        block=32,
        size=2 + 2 * minima + 4 * width,
        top=2**width - 1,
        zero=None if minima else 2 ** (width - 1),
        codes=fields,
        order=order,
        part=32,
        minima=minima,
    )


def _minima(number: int, file_type: int, width: int) -> BlockType:
    """Return Q4_K or Q5_K."""
    return BlockType(
        number=number,
        file_type=file_type,
        block=256,
        size=16 + 32 * width,
        top=2**width - 1,
        zero=None,
        codes=(Field(0, 4, 32), Field(4, 1, 32))[: width - 3],
        order=("d", "m", "scales", *(("q1",) if width > 4 else ()), "q0"),
        part=32,
        scales=(0, 63),
        minima=True,
    )


TYPES: Mapping[str, BlockType] = {
    "Q2_0": BlockType(42, 41, 64, 18, 3, 1, (Field(0, 2, 1),), ("d", "q0"), 64),
    "Q4_0": _small(2, 2, 4),
    "Q4_1": _small(3, 3, 4, minima=True),
    "Q5_0": _small(6, 8, 5),
    "Q5_1": _small(7, 9, 5, minima=True),
    "Q8_0": BlockType(8, 7, 32, 34, 254, 127, (Field(0, 8, 1),), ("d", "q0"), 32),
    "Q2_K": BlockType(
        10, 10, 256, 84, 3, None, (Field(0, 2, 32),), ("scales", "q0", "d", "m"), 16, scales=(0, 15), minima=True
    ),
    "Q3_K": BlockType(
        11, 12, 256, 110, 7, 4, (Field(0, 2, 32), Field(2, 1, 32)), ("q1", "q0", "scales", "d"), 16, scales=(-32, 31)
    ),
    "Q4_K": _minima(12, 15, 4),
    "Q5_K": _minima(13, 17, 5),
    "Q6_K": BlockType(
        14,
        18,
        256,
        210,
        63,
        32,
        (Field(0, 4, 64), Field(4, 2, 32)),
        ("q0", "q1", "scales", "d"),
        16,
        scales=(-128, 127),
    ),
    "IQ4_NL": BlockType(20, 25, 32, 18, 15, None, (Field(0, 4, 16),), ("d", "q0"), 32, values=IQ4_VALUES),
    "IQ4_XS": BlockType(
        23, 30, 256, 136, 15, None, (Field(0, 4, 16),), ("d", "scales", "q0"), 32, scales=(-32, 31), values=IQ4_VALUES
    ),
}
"""Types of which every weight has a code of its own, by name."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of one type, apart: n blocks of b weights with p parts.

    Attributes:
        codes: Shape (n, b).
        d: fp16, shape (n,).
        m: fp16, shape (n,); None without minima.
        scales: Whole numbers, shape (n, p); None without parts' scales.
        minima: Whole numbers, shape (n, p); None without parts' minima.
    """

    codes: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    def grid(self, kind: BlockType) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parts' scales, and what is added to scale · code (or · value), both fp32, shape (n, p)."""
        scale = self.d.float()[:, None]
        if self.scales is not None:
            scale = scale * self.scales.float()
        if kind.minima and self.m is not None:
            least = self.m.float()[:, None]
            return scale, least if self.minima is None else -(least * self.minima.float())
        return scale, torch.zeros_like(scale)

    def weights(self, kind: BlockType) -> torch.Tensor:
        """Return the weights, fp32, shape (n, b), by the operations that ggml does, in its order."""
        scale, added = (values[:, :, None] for values in self.grid(kind))
        codes = self.codes.unflatten(1, (-1, kind.part))
        if kind.values is not None:
            table = torch.tensor(kind.values, dtype=torch.float32, device=codes.device)
            return (scale * table[codes.long()]).flatten(1)
        if kind.minima:
            return (scale * codes.float() + added).flatten(1)
        return (scale * (codes.float() - float(kind.zero or 0))).flatten(1)


def pack(blocks: Blocks, name: str) -> torch.Tensor:
    """Return the bytes of blocks of a type, uint8, shape (blocks, size)."""
    kind = TYPES[name]
    made: list[torch.Tensor] = []
    for piece in kind.order:
        if piece == "scales":
            made.append(_SCALES[name][0](blocks))
        elif piece in ("d", "m"):
            number = blocks.d if piece == "d" else blocks.m
            assert number is not None
            made.append(number.half().contiguous().view(torch.uint8).view(-1, 2))
        else:
            codes = blocks.codes.int() - 127 if name == "Q8_0" else blocks.codes  # two's complement there
            made.append(kind.codes[int(piece[1:])].pack(codes))
    return torch.cat(made, dim=1)


def unpack(stored: torch.Tensor, name: str) -> Blocks:
    """Return the blocks that bytes (blocks, size) of a type hold."""
    kind = TYPES[name]
    sizes = [_size(kind, name, piece) for piece in kind.order]
    pieces = dict(zip(kind.order, stored.split(sizes, dim=1), strict=True))
    codes = sum(field.unpack(pieces[f"q{index}"]) for index, field in enumerate(kind.codes))
    assert isinstance(codes, torch.Tensor)
    if name == "Q8_0":
        codes = pieces["q0"].contiguous().view(torch.int8).int() + 127
    numbers = {key: pieces[key].contiguous().view(torch.float16).view(-1) for key in ("d", "m") if key in pieces}
    scales = minima = None
    if "scales" in pieces:
        scales, minima = _SCALES[name][1](pieces["scales"])
    return Blocks(codes, numbers["d"], numbers.get("m"), scales, minima)


def _size(kind: BlockType, name: str, piece: str) -> int:
    if piece == "scales":
        return _SCALES[name][2]
    return 2 if piece in ("d", "m") else kind.block * kind.codes[int(piece[1:])].width // 8


def _both(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    assert blocks.scales is not None and blocks.minima is not None
    return blocks.scales.int(), blocks.minima.int()


def _pack_nibbles(blocks: Blocks) -> torch.Tensor:
    scales, minima = _both(blocks)
    return (scales | (minima << 4)).to(torch.uint8)


def _unpack_nibbles(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return stored.int() & 15, stored.int() >> 4


def _pack_twelve(blocks: Blocks) -> torch.Tensor:
    """Return eight scales and eight minima of 6 bits: the last four of each are split into 4 and 2 bits."""
    scales, minima = _both(blocks)
    first = [values[:, :4] | ((values[:, 4:] >> 4) << 6) for values in (scales, minima)]
    last = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([*first, last], dim=1).to(torch.uint8)


def _unpack_twelve(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, minima, rest = stored.int().split(4, dim=1)
    return (
        torch.cat([scales & 63, (rest & 15) | ((scales >> 2) & 48)], dim=1),
        torch.cat([minima & 63, (rest >> 4) | ((minima >> 2) & 48)], dim=1),
    )


def _fields(fields: Sequence[Field]) -> tuple:  # type: ignore[type-arg]
    """Return functions that pack and unpack signed 6-bit scales, stored plus 32."""

    def packed(blocks: Blocks) -> torch.Tensor:
        assert blocks.scales is not None
        return torch.cat([field.pack(blocks.scales + 32) for field in fields], dim=1)

    def unpacked(stored: torch.Tensor) -> tuple[torch.Tensor, None]:
        widths = [field.width for field in fields]
        total = stored.shape[1]
        parts = stored.split([total * width // sum(widths) for width in widths], dim=1)
        found = torch.stack([field.unpack(part) for field, part in zip(fields, parts, strict=True)])
        return found.sum(dim=0) - 32, None

    return packed, unpacked


def _pack_bytes(blocks: Blocks) -> torch.Tensor:
    assert blocks.scales is not None
    return blocks.scales.to(torch.int8).view(torch.uint8)


def _unpack_bytes(stored: torch.Tensor) -> tuple[torch.Tensor, None]:
    return stored.contiguous().view(torch.int8).int(), None


_SCALES = {
    "Q2_K": (_pack_nibbles, _unpack_nibbles, 16),
    "Q3_K": (*_fields([Field(0, 4, 8), Field(4, 2, 4)]), 12),
    "Q4_K": (_pack_twelve, _unpack_twelve, 12),
    "Q5_K": (_pack_twelve, _unpack_twelve, 12),
    "Q6_K": (_pack_bytes, _unpack_bytes, 16),
    "IQ4_XS": (*_fields([Field(4, 2, 1), Field(0, 4, 1)]), 6),
}
