"""Checks the files of a checkpoint's weights by their headers, before any tensor is read."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from evosweep.core.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SCALES = "_scale_inv"  # behind the name of an FP8 weight
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"
LFS = b"version https://git-lfs"
"""First bytes of the text that Git leaves in place of a large file that it has not fetched."""
CODES = re.compile(r"^(I|U|F4|F6|F8|BOOL)")
"""Types of safetensors whose values are a weight's codes, not the weight."""


def check_weight_files(folder: Path, *, quantized: bool) -> None:
    """Raise ModelError where the safetensors files of a folder are missing, cut off, or hold codes without scales.

    Args:
        folder: Of the checkpoint.
        quantized: Whether its config.json says how its weights are coded.
    """
    for path in _files(folder):
        codes = _coded(path)
        if codes and not quantized:
            raise ModelError(
                f"model.path: {codes[0]} in {path} has type {codes[1]}, and config.json has no quantization_config "
                "that says what its values stand for: give the checkpoint in float32, bfloat16 or float16"
            )


def check_scale_grids(folder: Path, block: object) -> None:
    """Raise ModelError where an FP8 checkpoint's last block of rows or columns is narrower than the others.

    transformers (Fp8Dequantize, 5.23) takes a block to be a weight's shape over that of its grid of scales,
    which is another one then: where the division leaves no rest, the weight comes out wrong.

    Args:
        folder: Of the checkpoint.
        block: Rows and columns of a block, ``weight_block_size`` of its quantization_config; None: a scale a tensor.
    """
    if not isinstance(block, Sequence) or len(block) != 2:
        return
    shapes: dict[str, list[int]] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, grid in shapes.items():
        shape = shapes.get(name.removesuffix(SCALES), []) if name.endswith(SCALES) else []
        if len(shape) >= 2 and len(grid) == len(shape):
            sides = zip(shape[-2:], grid[-2:], block, strict=True)
            if any(parts > 1 and parts == -(-size // step) and size % step for size, parts, step in sides):
                raise ModelError(
                    f"model.path: {name.removesuffix(SCALES)} in {folder} has shape {tuple(shape)}, which blocks of "
                    f"{block[0]}x{block[1]} do not divide: transformers dequantizes it wrongly; give the dense "
                    "checkpoint that it was made from"
                )


def check_adapter_file(folder: Path) -> None:
    """Raise ModelError where the folder of an adapter of peft has no weights, or none that can be read."""
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        _coded(path)
    elif not (folder / PICKLED_ADAPTER).is_file():
        raise ModelError(f"model.path: the adapter {folder} has no weights ({ADAPTER_WEIGHTS})")


def _files(folder: Path) -> list[Path]:
    """Return the files of safetensors that transformers will read; none where the weights are pickled.

    Raises:
        ModelError: There are no weights, or a file is not there.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        if any((folder / name).is_file() for name in PICKLED):
            return []
        raise ModelError(f"model.path: {folder} has a config.json and no weights ({SINGLE}, or {INDEX} and its files)")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path: {index} is damaged: copy it again") from error
    _check_there(folder, names)
    return [folder / name for name in names]


def _check_there(folder: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more that {INDEX} names" if len(missing) > 1 else f", which {INDEX} names"
        raise ModelError(f"model.path: {folder} lacks {missing[0]}{more}: copy the checkpoint again")


def _coded(path: Path) -> tuple[str, str] | None:
    """Return name and type of the first weight of a file that is not of a floating type of 16 bits or more.

    Raises:
        ModelError: The file is a Git LFS pointer, empty, cut off, or something else.
    """
    with path.open("rb") as handle:
        if handle.read(len(LFS)) == LFS:
            raise ModelError(f"model.path: {path} is a Git LFS pointer, not the weights: run git lfs pull there")
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                kind = str(tensors.get_slice(name).get_dtype())
                if name.endswith(".weight") and CODES.match(kind):
                    return name, kind
    except SafetensorError as error:
        raise ModelError(
            f"model.path: {path}, {path.stat().st_size} bytes, is cut off or no safetensors file ({error}): copy it "
            "again"
        ) from error
    return None
