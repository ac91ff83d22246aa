"""Whole numbers times a step of the layer and of their column, in Huffman code: what is rare takes more bits.

The code of a number follows from the spread of its row and its column, which are stored in 4 and 3 bits; the steps of
the columns are quarter octaves, 5 bits each. All codes' first bits come first, then all second bits of the codes that
have one, and so on, so that many codes are read at once. The stream is filled up with zeros to a planned size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.code_tables import LEAST, MOST, PAIRED, CodeTables, code_tables
from evosweep.compressors.formats.grouped_int import pack, unpack
from evosweep.compressors.payload import Payload
from evosweep.core.errors import StoreError

ROW_WIDTH = 4
SPREAD_WIDTH = 3
STEP_WIDTH = 5
MIDDLE_SPREAD = 4  # of a column's 3 bits: the spread is that of the layer
ESCAPE_WIDTH = 16
ZERO = 2 ** (ESCAPE_WIDTH - 1)  # added to a number behind an escape
WIDEST_ZERO = 128  # added to the widest spread's byte
HEADER_BITS = 16 + 8


@dataclass(frozen=True)
class Spreads:
    """How far the numbers of each row and column spread, in quarter octaves; whole numbers.

    Attributes:
        rows: Quarter octaves below the widest row, 0 to 15, shape (rows,).
        columns: Of a column's weights, over the layer's, −4 to 3, shape (columns,).
        steps: Of a column's step, over the layer's, 0 to 31, shape (columns,).
        widest: log2 of the widest row's spread over the layer's step, times four.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    steps: torch.Tensor
    widest: int


@dataclass(frozen=True)
class _Words:
    """Symbols of a weight in the order in which they are coded: pairs, then single numbers.

    Attributes:
        symbol: Number in the tables, shape (symbols,).
        escaped: The numbers behind escapes, plus ZERO.
    """

    symbol: torch.Tensor
    escaped: torch.Tensor


def side_bits(*, rows: int, columns: int) -> int:
    """Return the bits of everything but the codes."""
    planes = ROW_WIDTH * -(-rows // 8) + (SPREAD_WIDTH + STEP_WIDTH) * -(-columns // 8)
    return 8 * planes + HEADER_BITS


def coded_bits(numbers: torch.Tensor, spreads: Spreads) -> torch.Tensor:
    """Return the bits that the codes of a weight take, without padding, int64, shape (); nothing waits for the device.

    Args:
        numbers: Whole numbers of less than ZERO, shape (rows, columns).
        spreads: Of its rows and columns.
    """
    tables = code_tables(numbers.device)
    context, paired, order = _contexts(spreads)
    index, escapes, limit = _indices(numbers, order, context, tables)
    first = tables.first[context]
    one = torch.where(paired, index[:, 0] * (2 * limit + 2) + index[:, 1], index[:, 0]) + first
    other = torch.where(paired, 0, tables.length[torch.where(paired, 0, index[:, 1] + first)])
    return (tables.length[one] + other).sum() + ESCAPE_WIDTH * escapes.sum()


def encode(*, numbers: torch.Tensor, spreads: Spreads, step: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight, ``size`` bytes together.

    Args:
        numbers: Whole numbers of less than ZERO, shape (rows, columns).
        spreads: Of its rows and columns.
        step: The layer's step, a value of fp16, shape ().
        size: Bytes of all tensors; what the codes leave is zeros.

    Raises:
        StoreError: The codes take more.
    """
    tables = code_tables(numbers.device)
    words = _words(numbers, spreads, tables)
    escaped = _bits_of(words.escaped)
    coded = _bits_at_once(words.symbol, tables) if numbers.is_cuda else torch.cat(_bit_planes(words.symbol, tables))
    bits = torch.cat([coded, escaped])
    room = size - side_bits(rows=numbers.shape[0], columns=numbers.shape[1]) // 8
    stream = pack(bits, 1)[0]
    if len(stream) > room:
        raise StoreError(f"codes of {len(stream)} bytes do not fit into {room}")
    return {
        "codes": torch.nn.functional.pad(stream, (0, room - len(stream))),
        "rows": pack(spreads.rows, ROW_WIDTH),
        "columns": pack(spreads.columns + MIDDLE_SPREAD, SPREAD_WIDTH),
        "steps": pack(spreads.steps, STEP_WIDTH),
        "step": step.half().reshape(1),
        "widest": torch.tensor([spreads.widest + WIDEST_ZERO], dtype=torch.uint8, device=numbers.device),
    }


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
    spreads = Spreads(
        rows=unpack(tensors["rows"], ROW_WIDTH, rows).long(),
        columns=unpack(tensors["columns"], SPREAD_WIDTH, columns).long() - MIDDLE_SPREAD,
        steps=unpack(tensors["steps"], STEP_WIDTH, columns).long(),
        widest=int(tensors["widest"]) - WIDEST_ZERO,
    )
    numbers = decode_numbers(tensors["codes"], spreads)
    return numbers.float() * tensors["step"].float() * column_factors(spreads.steps)


def decode_numbers(stream: torch.Tensor, spreads: Spreads) -> torch.Tensor:
    """Return the whole numbers that a stream of codes stands for, int32, shape (rows, columns)."""
    tables = code_tables(stream.device)
    context, paired, order = _contexts(spreads)
    bits = unpack(stream[None], 1, 8 * len(stream))
    limits = tables.limit[context]
    single = ~paired
    tokens = torch.cat([context[paired], context[single].repeat(2)])
    index, position = _read(bits, tables.root[tokens], tables.child)
    pairs, singles = index.split([int(paired.sum()), 2 * int(single.sum())])
    halves = torch.empty((2, *context.shape), dtype=torch.int32, device=stream.device)
    base = 2 * limits[paired] + 2
    first = pairs // base
    halves[0, paired] = first
    halves[1, paired] = pairs - first * base
    halves[:, single] = singles.view(2, -1)
    halves -= limits
    escapes = halves > limits
    behind = bits[position : position + ESCAPE_WIDTH * int(escapes.sum())].view(-1, ESCAPE_WIDTH).int()
    shifts = torch.arange(ESCAPE_WIDTH, device=bits.device)
    halves[escapes] = (behind << shifts).sum(dim=1, dtype=torch.int32) - ZERO
    numbers = torch.empty((2 * len(context), context.shape[1]), dtype=torch.int32, device=stream.device)
    numbers[order] = halves.transpose(0, 1).reshape(numbers.shape)
    return numbers[: len(spreads.rows)]


def column_factors(steps: torch.Tensor) -> torch.Tensor:
    """Return each column's step over the layer's, 2^(steps / 4), fp32; steps are whole numbers."""
    parts = torch.tensor([2.0 ** (part / 4) for part in range(4)], device=steps.device)
    return torch.ldexp(parts[steps % 4], steps // 4)


def _bits_of(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of numbers of ESCAPE_WIDTH bits, the lowest first, uint8."""
    return ((values[:, None] >> torch.arange(ESCAPE_WIDTH, device=values.device)) & 1).flatten().to(torch.uint8)


def _contexts(spreads: Spreads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the code of every pair of numbers, whether it is a pair's, and the rows by falling spread.

    Rows are paired in the order of their spreads, so that the two of a pair spread alike; of an odd number, the last
    one's partner is a row of zeros.

    Returns:
        Indices of contexts, int64, shape (pairs of rows, columns); bool, same shape; rows in the order of the pairs.
    """
    rows = spreads.rows.long()
    rows = torch.cat([rows, rows.amax().reshape(1)]) if len(rows) % 2 else rows
    order = rows.argsort(stable=True)
    by_pair = rows[order].view(-1, 2).sum(dim=1) // 2
    context = (spreads.widest - by_pair)[:, None] + (spreads.columns - spreads.steps)[None]
    context = context.clamp_(LEAST, MOST)
    return context - LEAST, context <= PAIRED, order


def _words(numbers: torch.Tensor, spreads: Spreads, tables: CodeTables) -> _Words:
    """Return the symbols of a weight, in the order in which they are coded."""
    context, paired, order = _contexts(spreads)
    index, escapes, limit = _indices(numbers, order, context, tables)
    first = tables.first[context]
    pairs = (index[:, 0] * (2 * limit + 2) + index[:, 1] + first)[paired]
    singles = (index + first[:, None]).transpose(0, 1)[:, ~paired].flatten()
    rows = _paired_rows(numbers, order)
    return _Words(torch.cat([pairs, singles]), rows.transpose(0, 1)[escapes.transpose(0, 1)] + ZERO)


def _paired_rows(numbers: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the numbers in pairs of rows, int32, shape (pairs, 2, columns); a row of zeros joins an odd one."""
    rows = torch.nn.functional.pad(numbers.int(), (0, 0, 0, len(numbers) % 2))
    return rows[order].view(-1, 2, numbers.shape[1])


def _indices(
    numbers: torch.Tensor, order: torch.Tensor, context: torch.Tensor, tables: CodeTables
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return every number's index in its context, which are escapes (both (pairs, 2, columns)), and contexts' limits.

    Args:
        numbers: Shape (rows, columns).
        order: Rows in the order of their pairs.
        context: Shape (pairs, columns).
        tables: Code words of all contexts.
    """
    rows = _paired_rows(numbers, order)
    limit = tables.limit[context]
    escapes = rows.abs() > limit[:, None]
    return torch.where(escapes, limit[:, None] + 1, rows) + limit[:, None], escapes, limit


def _bit_planes(symbol: torch.Tensor, tables: CodeTables) -> list[torch.Tensor]:
    """Return the first bits of all words, the second bits of those that have one, and so on; uint8."""
    left = tables.length[symbol]
    word = tables.word[symbol]
    planes = []
    while len(left):
        left = left - 1
        planes.append(((word >> left) & 1).to(torch.uint8))
        longer = left.nonzero()[:, 0]
        left = left[longer]
        word = word[longer]
    return planes


def _bits_at_once(symbol: torch.Tensor, tables: CodeTables) -> torch.Tensor:
    """Return the planes of ``_bit_planes`` one after the other; the device is waited for once, not at every plane."""
    length = tables.length[symbol]
    word = tables.word[symbol]
    count = int(length.sum())
    bits = torch.empty(count + 1, dtype=torch.uint8, device=symbol.device)  # the last one is written by all that end
    start = torch.zeros((), dtype=torch.int64, device=symbol.device)
    for plane in range(tables.longest):
        inside = length > plane
        position = torch.where(inside, inside.cumsum(0) + (start - 1), count)
        bits[position] = ((word >> (length - plane - 1).clamp_(min=0)) & 1).to(torch.uint8)
        start = start + inside.sum()
    return bits[:count]


def _read(bits: torch.Tensor, node: torch.Tensor, child: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the index of every symbol in its context, and how many bits were read.

    Args:
        bits: The stream's, uint8.
        node: Root of each symbol's tree, shape (symbols,).
        child: Of ``CodeTables``.
    """
    reached = child[node + bits[: len(node)]]
    position = len(node)
    index = reached.clone()
    open_ones = (reached >= 0).nonzero()[:, 0]
    while len(open_ones):
        reached = child[index[open_ones] + bits[position : position + len(open_ones)]]
        position += len(open_ones)
        index[open_ones] = reached
        open_ones = open_ones[(reached >= 0).nonzero()[:, 0]]
    return -1 - index, position
