"""Points of a fixed grid for one or two weights together, a scale a group of columns, a rotation from a seed.

Codes of up to eight bits are bit planes, as in ``grouped_int``; wider ones are two sets of planes. The grids are those
of the standard normal distribution (``gaussian_grids.safetensors``, made by ``benchmarks/gaussian_grids.py``).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from evosweep.compressors.formats.grouped_int import SCALE_BITS, pack, unpack
from evosweep.compressors.payload import Payload
from evosweep.compressors.rotation import Rotation

BYTE = 8
GRIDS = Path(__file__).parent.parent / "gaussian_grids.safetensors"


def bits(*, rows: int, columns: int, dimension: int, width: int, group: int) -> int:
    """Return the exact size in bits: codes + scales.

    Args:
        rows: Output features.
        columns: Input features.
        dimension: Weights of one code.
        width: Bits a code.
        group: Columns a scale.
    """
    codes = rows * columns // dimension
    return width * BYTE * -(-codes // BYTE) + SCALE_BITS * rows * (columns // group)


@functools.cache
def grid_points(dimension: int, points: int, device: torch.device) -> torch.Tensor:
    """Return the MSE-optimal grid of the standard normal distribution, fp32, shape (points, dimension).

    Args:
        dimension: 1 or 2.
        points: One of ``sizes``.
        device: Where the grid is needed.
    """
    return _grids()[f"{dimension}x{points}"].to(device)


@functools.cache
def _grids() -> dict[str, torch.Tensor]:
    return load_file(GRIDS)


def sizes(dimension: int) -> list[int]:
    """Return the numbers of points for which there is a grid, rising."""
    return sorted(int(name.split("x")[1]) for name in _grids() if name.startswith(f"{dimension}x"))


def encode(*, codes: torch.Tensor, scales: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantized weight.

    Args:
        codes: Indices of points, shape (rows, columns / dimension).
        scales: Values of fp16, shape (rows, groups).
        width: Bits a code.
    """
    tensors = {"codes": pack(codes & 255, min(width, BYTE)), "scales": scales.half().contiguous()}
    if width > BYTE:
        tensors["high"] = pack(codes >> BYTE, width - BYTE)
    return tensors


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: What ``encode`` returned, on any one device.
        meta: ``rows``, ``columns``, ``dimension``, ``width``, and ``seed`` and sides of the rotation (``rotated``).
        parts: None; this format holds no other payload.
    """
    del parts
    rows, columns, dimension, width = (int(meta[key]) for key in ("rows", "columns", "dimension", "width"))
    count = rows * columns // dimension
    codes = unpack(tensors["codes"], min(width, BYTE), count).long()
    if "high" in tensors:
        codes += unpack(tensors["high"], width - BYTE, count).long() << BYTE
    scales = tensors["scales"].float()
    points = grid_points(dimension, 2**width, codes.device)[codes]
    weight = (points.view(rows, scales.shape[1], -1) * scales[:, :, None]).view(rows, columns)
    return unrotated(weight, seed=int(meta["seed"]), sides=meta["rotated"])


def rotated(weight: torch.Tensor, *, seed: int, sides: str) -> torch.Tensor:
    """Return a weight with its inputs, or inputs and outputs, rotated.

    Args:
        weight: Shape (out, in).
        seed: Of the rotations.
        sides: ``none``, ``input`` or ``both``.
    """
    if sides == "none":
        return weight
    weight = Rotation.of(weight.shape[1], seed=seed, device=weight.device).apply(weight)
    if sides == "input":
        return weight
    return Rotation.of(weight.shape[0], seed=seed, device=weight.device).apply(weight.T.contiguous()).T.contiguous()


def unrotated(weight: torch.Tensor, *, seed: int, sides: str) -> torch.Tensor:
    """Return what ``rotated`` was given.

    Args:
        weight: Shape (out, in).
        seed: Of the rotations.
        sides: ``none``, ``input`` or ``both``.
    """
    if sides == "none":
        return weight
    if sides == "both":
        weight = (
            Rotation.of(weight.shape[0], seed=seed, device=weight.device).undo(weight.T.contiguous()).T.contiguous()
        )
    return Rotation.of(weight.shape[1], seed=seed, device=weight.device).undo(weight)
