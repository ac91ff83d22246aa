"""Codes of any width as a dense little-endian bit stream in 32-bit words, as MLX and GPTQ's formats keep them.

32 codes of b bits fill exactly b words: code i is at the bits [i·b, (i+1)·b) of the stream, across words if need be.
For widths that divide 32 that is the usual ``code << shift`` within a word. MLX keeps weights so (``mlx/ops.cpp``,
``affine_quantize``), and so do AutoGPTQ, GPTQModel and auto-round (``auto_round/utils/bit_packing.py``).
"""

import torch

BLOCK = 32  # codes that fill whole words, whatever their width
WORD = 32  # bits of a word


def pack_words(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes as int32 words, packed along the last dimension: n codes become n·width/32 words.

    Args:
        codes: Below 2^width, shape (..., n); n is a multiple of 32.
        width: Bits a code, from 1 to 8.

    Raises:
        ValueError: n is no multiple of 32.
    """
    if codes.shape[-1] % BLOCK:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole words: a multiple of {BLOCK} does")
    blocks = codes.unflatten(-1, (-1, BLOCK)).to(torch.int64)
    words = torch.zeros((*blocks.shape[:-1], width), dtype=torch.int64, device=codes.device)
    for position in range(BLOCK):
        word, shift = divmod(position * width, WORD)
        words[..., word] |= blocks[..., position] << shift
        if shift + width > WORD:
            words[..., word + 1] |= blocks[..., position] >> (WORD - shift)
    low = words & (2**WORD - 1)
    return torch.where(low < 2 ** (WORD - 1), low, low - 2**WORD).to(torch.int32).flatten(-2)


def unpack_words(words: torch.Tensor, width: int) -> torch.Tensor:
    """Return the codes of a stream along the last dimension, uint8 of shape (..., n) for n·width/32 words.

    Args:
        words: What ``pack_words`` returned, or the same bits in another type of 32 bits.
        width: Bits a code.
    """
    stream = words.view(torch.int32).unflatten(-1, (-1, width)).to(torch.int64) & (2**WORD - 1)
    codes = torch.empty((*stream.shape[:-1], BLOCK), dtype=torch.uint8, device=words.device)
    for position in range(BLOCK):
        word, shift = divmod(position * width, WORD)
        bits = stream[..., word] >> shift
        if shift + width > WORD:
            bits = bits | (stream[..., word + 1] << (WORD - shift))
        codes[..., position] = (bits & (2**width - 1)).to(torch.uint8)
    return codes.flatten(-2)
