"""Quantizes a matrix with ggml's own code: <weight.npy> <importance.npy or none> <type number> <bytes.npy>."""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np


def library() -> ctypes.CDLL:
    """Returns the shared library with ggml and llama.cpp in it."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    return ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))


def quantize(weight: np.ndarray, importance: np.ndarray | None, number: int) -> np.ndarray:
    """Returns the blocks of a matrix (rows, columns), uint8, shape (rows, bytes).

    Args:
        weight: fp32.
        importance: Of each column, fp32; None: none.
        number: Of the type in ggml_type.
    """
    made = library().ggml_quantize_chunk
    made.restype = ctypes.c_size_t
    made.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, columns = weight.shape
    target = np.zeros(weight.nbytes, dtype=np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    size = made(number, weight.ctypes.data, target.ctypes.data, 0, rows, columns, pointer)
    return target[:size].reshape(rows, -1)


if __name__ == "__main__":
    source, weights, number, out = sys.argv[1:]
    importance = None if weights == "none" else np.ascontiguousarray(np.load(weights), dtype=np.float32)
    blocks = quantize(np.ascontiguousarray(np.load(source), dtype=np.float32), importance, int(number))
    np.save(out, blocks)
    sys.stdout.write(json.dumps({"bytes": int(blocks.nbytes)}) + "\n")
