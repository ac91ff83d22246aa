"""log Σ exp over the vocabulary as one GPU kernel that never stores a logit, and the labels' logits as another.

The sum is taken online over tiles of the vocabulary (Milakov and Gimelshein, arXiv 1805.02867, section 3): a tile's
logits stay in registers between the matrix product and their part of the sum.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU's exponential has base 2
LOWEST = tl.constexpr(-1e30)  # below any logit; minus infinity less itself would be no number
WAVES = 8  # programs for every processor of the GPU, so that the last round, which leaves some idle, counts little
CACHED_BYTES = 16e6  # of hidden states that running programs share in the GPU's cache
LABEL_ROWS = 16  # tokens of one program of the labels' kernel


@dataclass(frozen=True)
class Tile:
    """The block of logits that a program holds at a time.

    Attributes:
        tokens: Its rows.
        vocabulary: Its columns.
        hidden: Length of the sums' pieces.
        warps: Groups of 32 threads.
        stages: Pieces in shared memory at once.
    """

    tokens: int = 128
    vocabulary: int = 256
    hidden: int = 64
    warps: int = 8
    stages: int = 3

    def shared_bytes(self) -> int:
        """Return the shared memory that half-precision pieces take."""
        return 2 * self.stages * (self.tokens + self.vocabulary) * self.hidden


@triton.jit
def _log_sum_exp(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    sums,
    tokens,
    vocabulary,
    hidden_stride,
    weight_stride,
    splits,
    BIASED: tl.constexpr,
    RAGGED: tl.constexpr,
    UNEVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    split = tl.program_id(0) % splits
    first_row = (tl.program_id(0) // splits) * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_inside = row < tokens
    depth = tl.arange(0, DEPTH)
    hidden_rows = hidden
    if not DESCRIBED:
        hidden_rows = hidden + tl.where(row_inside, row, 0).to(tl.int64)[:, None] * hidden_stride
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(0, TILES, flatten=True):
        first_column = (split * TILES + tile) * COLUMNS
        column = first_column + tl.arange(0, COLUMNS)
        column_inside = column < vocabulary
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, WIDTH, DEPTH):
            if DESCRIBED:  # zeros outside
                left = hidden.load([first_row, start])
                right = weight.load([first_column, start]).T
            else:
                weight_rows = weight + tl.where(column_inside, column, 0).to(tl.int64)[None, :] * weight_stride
                if UNEVEN:
                    inside = start + depth < WIDTH
                    left = tl.load(hidden_rows + start + depth[None, :], mask=inside[None, :], other=0.0)
                    right = tl.load(weight_rows + start + depth[:, None], mask=inside[:, None], other=0.0)
                else:
                    left = tl.load(hidden_rows + start + depth[None, :])
                    right = tl.load(weight_rows + start + depth[:, None])
            logits = tl.dot(left, right, logits)
        if BIASED:
            logits += tl.load(bias + column, mask=column_inside, other=float("-inf")).to(tl.float32)[None, :]
        elif RAGGED:
            logits += tl.where(column_inside, 0.0, float("-inf"))[None, :]
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        # One where the maximum stays: multiplied first, its rounding would add up over the tiles.
        total *= tl.exp2((highest - higher) * LOG2_E)
        total += tl.sum(tl.exp2(logits * LOG2_E - (higher * LOG2_E)[:, None]), axis=1)
        highest = higher
    tl.store(sums + split * tokens + row, highest + tl.log2(total) / LOG2_E, mask=row_inside)


def logsumexp(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, tile: Tile | None = None
) -> torch.Tensor:
    """Return log Σ exp(hidden @ weight.T + bias) over the vocabulary, fp32, shape (tokens,).

    Args:
        hidden: Final hidden states (tokens, hidden), bfloat16 or float16.
        weight: The head's matrix (vocabulary, hidden), of the same type.
        bias: Its bias (vocabulary,), or None.
        tile: Block of logits of a program; None takes the largest whose pieces fit the GPU's shared memory.
    """
    hidden, weight = (_rows_contiguous(matrix) for matrix in (hidden, weight))
    tile = tile or _largest_tile(hidden.device)
    tokens, width = hidden.shape
    blocks = triton.cdiv(tokens, tile.tokens)
    tiles = triton.cdiv(len(weight), tile.vocabulary)
    splits = _splits(blocks, tiles, block_bytes=2 * tile.tokens * width, processors=_processors(hidden.device))
    share = triton.cdiv(tiles, splits)
    sums = torch.empty(splits, tokens, device=hidden.device)
    described = _describable(hidden) and _describable(weight)
    if tokens:
        _log_sum_exp[(blocks * splits,)](
            TensorDescriptor.from_tensor(hidden, [tile.tokens, tile.hidden]) if described else hidden,
            TensorDescriptor.from_tensor(weight, [tile.vocabulary, tile.hidden]) if described else weight,
            weight if bias is None else bias.contiguous(),
            sums,
            tokens,
            len(weight),
            hidden.stride(0),
            weight.stride(0),
            splits,
            BIASED=bias is not None,
            RAGGED=len(weight) != splits * share * tile.vocabulary,
            UNEVEN=width % tile.hidden != 0,
            DESCRIBED=described,
            ROWS=tile.tokens,
            COLUMNS=tile.vocabulary,
            DEPTH=tile.hidden,
            TILES=share,
            WIDTH=width,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return sums[0] if splits == 1 else sums.logsumexp(dim=0)


@triton.jit
def _label_logits(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    labels,
    logits,
    tokens,
    hidden_stride,
    weight_stride,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < tokens
    label = tl.load(labels + row, mask=row_inside, other=0).to(tl.int64)
    products = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = row_inside[:, None] & (depth < WIDTH)[None, :]
        left = tl.load(hidden + row.to(tl.int64)[:, None] * hidden_stride + depth[None, :], mask=inside, other=0.0)
        right = tl.load(weight + label[:, None] * weight_stride + depth[None, :], mask=inside, other=0.0)
        products += left.to(tl.float32) * right.to(tl.float32)
    found = tl.sum(products, axis=1)
    if BIASED:
        found += tl.load(bias + label).to(tl.float32)
    tl.store(logits + row, found, mask=row_inside)


def label_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Return the logit of every token's label, fp32, shape (tokens,).

    Args:
        hidden: Final hidden states (tokens, hidden).
        weight: The head's matrix (vocabulary, hidden).
        bias: Its bias (vocabulary,), or None.
        labels: Indices into the vocabulary (tokens,).
    """
    hidden, weight = (_rows_contiguous(matrix) for matrix in (hidden, weight))
    tokens, width = hidden.shape
    logits = torch.empty(tokens, device=hidden.device)
    if tokens:
        _label_logits[(triton.cdiv(tokens, LABEL_ROWS),)](
            hidden,
            weight,
            weight if bias is None else bias.contiguous(),
            labels.contiguous(),
            logits,
            tokens,
            hidden.stride(0),
            weight.stride(0),
            BIASED=bias is not None,
            ROWS=LABEL_ROWS,
            DEPTH=128,
            WIDTH=width,
            num_warps=4,
        )
    return logits


def _rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _describable(matrix: torch.Tensor) -> bool:
    """Return whether the copy engine of newer GPUs can read a matrix: rows start at multiples of 16 bytes."""
    newer = matrix.device.type != "cuda" or torch.cuda.get_device_capability(matrix.device) >= (9, 0)
    return newer and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _largest_tile(device: torch.device) -> Tile:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    shared = getattr(properties, "shared_memory_per_block_optin", 0)  # bytes
    if shared >= Tile().shared_bytes():
        return Tile()
    return Tile(tokens=64, vocabulary=128, hidden=32, warps=4, stages=2)


def _splits(blocks: int, tiles: int, *, block_bytes: int, processors: int) -> int:
    """Return among how many programs the vocabulary is shared, for a block of tokens: a power of two.

    Every other number would be compiled anew.

    Args:
        blocks: Blocks of tokens.
        tiles: Tiles of the vocabulary, at least one a program.
        block_bytes: Size of a block's hidden states.
        processors: Of the GPU, each with a program of its own at any time.
    """
    busy = triton.cdiv(WAVES * processors, max(1, blocks))
    cached = int(processors * block_bytes / CACHED_BYTES)  # more programs on fewer blocks
    return 1 << (max(1, min(tiles, max(busy, cached))).bit_length() - 1)
