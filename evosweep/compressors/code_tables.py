"""Huffman codes for pairs of whole numbers that come from rounding normally distributed values, one code a spread.

Nothing of a code is stored: it follows from its spread alone. Whole numbers from small spreads are coded in pairs,
which costs 0.02 bits a number over the entropy where single numbers cost 0.04 to 0.4.
"""

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

LEAST = -10  # spreads 2^(context / 4), from 0.18
MOST = 28  # to 128
PAIRED = 6  # the largest context whose numbers are coded in pairs
WIDE_SHARE = 0.02  # of the numbers come from a spread that is WIDE times as large: rows are never quite normal
WIDE = 2.5
REACH = 4  # numbers up to so many spreads have a code word; others are an escape, followed by two bytes
RESOLUTION = 2.0**24  # probabilities are whole multiples of 1/RESOLUTION, so that every machine makes the same code


@dataclass(frozen=True)
class CodeTables:
    """Code words of all contexts, and the trees that read them.

    A symbol of context c is numbered ``first[c] + index``; index is ``number + limit[c]``, the last one is the escape,
    and for a pair ``index of one · (2·limit[c] + 2) + index of the other``.

    Attributes:
        limit: Largest number with a code word, int32, shape (contexts,).
        first: Number of a context's first symbol, int32, shape (contexts,).
        root: Tree node where a context's words begin, int32, shape (contexts,).
        length: Bits of each symbol's word, int32, shape (symbols,).
        word: The words, the first bit highest, int32, shape (symbols,).
        child: Next node after a bit, ``child[node + bit]``; ``−1 − index`` at a symbol, int32, shape (children,).
        rate: Expected bits a number, by context, fp64.
    """

    limit: torch.Tensor
    first: torch.Tensor
    root: torch.Tensor
    length: torch.Tensor
    word: torch.Tensor
    child: torch.Tensor
    rate: torch.Tensor

    @cached_property
    def longest(self) -> int:
        """Bits of the longest word."""
        return int(self.length.max())

    def to(self, device: torch.device) -> "CodeTables":
        """Return the tables on a device."""
        return CodeTables(**{name: value.to(device) for name, value in vars(self).items()})


@functools.cache
def code_tables(device: torch.device) -> CodeTables:
    """Return the tables of contexts LEAST .. MOST, on a device."""
    return _tables().to(device)


@functools.cache
def _tables() -> CodeTables:
    limits: list[int] = []
    firsts: list[int] = []
    roots: list[int] = []
    lengths: list[int] = []
    words: list[int] = []
    children: list[int] = []
    rates: list[float] = []
    for context in range(LEAST, MOST + 1):
        limit, counts = _single_counts(2.0 ** (context / 4))
        numbers = 2 if context <= PAIRED else 1
        counts = _pair_counts(counts) if numbers == 2 else counts
        tree = huffman_tree(counts)
        length, word = _code_words(tree, len(counts))
        limits.append(limit)
        firsts.append(len(lengths))
        roots.append(len(children))
        children += [child if child < 0 else 2 * child + roots[-1] for child in tree]
        lengths += length
        words += word
        rates.append(float(np.dot(counts, length)) / sum(counts) / numbers)
    return CodeTables(
        limit=torch.tensor(limits, dtype=torch.int32),
        first=torch.tensor(firsts, dtype=torch.int32),
        root=torch.tensor(roots, dtype=torch.int32),
        length=torch.tensor(lengths, dtype=torch.int32),
        word=torch.tensor(words, dtype=torch.int32),
        child=torch.tensor(children, dtype=torch.int32),
        rate=torch.tensor(rates, dtype=torch.float64),
    )


def _single_counts(spread: float) -> tuple[int, list[int]]:
    """Return the largest number with a word, and how often −limit .. limit and the escape come, of RESOLUTION."""
    limit = max(1, math.ceil(REACH * spread))
    shares = [
        (1 - WIDE_SHARE) * _share(number, spread) + WIDE_SHARE * _share(number, WIDE * spread)
        for number in range(-limit, limit + 1)
    ]
    shares.append(max(1 - sum(shares), 2e-5))
    return limit, [max(1, round(share * RESOLUTION)) for share in shares]


def _share(number: int, spread: float) -> float:
    """Return the probability that a normally distributed value of this spread is rounded to a number."""
    scale = spread * math.sqrt(2)
    if not number:
        return math.erf(0.5 / scale)
    return (math.erfc((abs(number) - 0.5) / scale) - math.erfc((abs(number) + 0.5) / scale)) / 2


def _pair_counts(counts: Sequence[int]) -> list[int]:
    return [max(1, (one * other) >> 24) for one in counts for other in counts]


def huffman_tree(counts: Sequence[int]) -> list[int]:
    """Return the children of a Huffman tree's nodes, root first: ``−1 − symbol`` at a leaf, else the node's number.

    Equal counts are merged in the order in which they came, so that the tree follows from the counts alone.

    Args:
        counts: How often each symbol comes, at least two of them.
    """
    heap = [(count, symbol, -1 - symbol) for symbol, count in enumerate(counts)]
    heapq.heapify(heap)
    pairs: list[tuple[int, int]] = []
    while len(heap) > 1:
        one = heapq.heappop(heap)
        other = heapq.heappop(heap)
        pairs.append((one[2], other[2]))
        heapq.heappush(heap, (one[0] + other[0], len(counts) + len(pairs), len(pairs) - 1))
    last = len(pairs) - 1  # the root was made last
    return [child if child < 0 else last - child for pair in reversed(pairs) for child in pair]


def _code_words(tree: Sequence[int], symbols: int) -> tuple[list[int], list[int]]:
    """Return length and word of every symbol of a tree."""
    length = [0] * symbols
    word = [0] * symbols
    waiting = [(0, 0, 0)]
    while waiting:
        node, depth, path = waiting.pop()
        for bit in (0, 1):
            child = tree[2 * node + bit]
            if child < 0:
                length[-1 - child] = depth + 1
                word[-1 - child] = 2 * path + bit
            else:
                waiting.append((child, depth + 1, 2 * path + bit))
    return length, word
