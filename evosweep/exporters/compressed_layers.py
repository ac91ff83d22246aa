"""Layers as compressed-tensors holds them: what a level's payload is there, tensor by tensor.

Formats and names of tensors are those of compressed-tensors 0.18 and later, whose integers of 3, 5, 6 and 7 bits are a
dense stream in 32-bit words, without padding (``compressors/pack_quantized/helpers.py`` there).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.base import Compressor
from evosweep.compressors.floating import FloatingPoint
from evosweep.compressors.formats import grouped_int, plain
from evosweep.compressors.formats.float_blocks import ELEMENTS
from evosweep.compressors.formats.grouped_int import unpack
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.several import single
from evosweep.store.manifest import Stored

PACKED = "pack-quantized"
MIXED = "mixed-precision"
FLOATS = ("fp8", "fp8_tensor", "mxfp4", "nvfp4")
"""Number formats of ``compressor=floating`` that compressed-tensors holds."""


@dataclass(frozen=True)
class Scheme:
    """How layers are compressed; layers of one scheme are one group of the config.

    Attributes:
        format: compressed-tensors' name of the storage format.
        weights: Its arguments of the weights' quantization, as sorted pairs.
    """

    format: str
    weights: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, name: str, **weights: Any) -> "Scheme":
        """Return the scheme of a format with arguments."""
        return cls(name, tuple(sorted({"dynamic": False, **weights}.items())))


Tensors = dict[str, torch.Tensor]


def compressed(stored: Stored, dtype: torch.dtype) -> tuple[Scheme | None, Tensors]:
    """Return a level's scheme, None for a weight that stays as it is, and its tensors by their names in the module.

    Args:
        stored: The level, of a compressor that ``unfit`` has nothing against.
        dtype: Type of the model, in which scales of integers are kept.
    """
    if stored.format == plain.__name__:
        return None, {"weight": stored.tensors()["weight"].to(dtype)}
    if stored.format == grouped_int.__name__:
        return _integers(stored.tensors(), stored.meta, dtype)
    return WRITERS[str(stored.meta["element"]), str(stored.meta["scale"])](stored.tensors(), stored.meta)


def unfit(compressor: Compressor) -> str:
    """Return which levels of a compressor compressed-tensors does not hold, in a few words; nothing if it holds all."""
    for part in single(compressor):
        if not isinstance(part, IntegerLevels | AsIs | FloatingPoint):
            return "it holds bit-widths and small floats: compressor=gptq"
    unknown = [name for name in float_formats(compressor) if name not in FLOATS]
    return f"it holds no {unknown[0]}: compressor.formats=[{','.join(FLOATS[:1])}]" if unknown else ""


def integer_parts(compressor: Compressor) -> list[IntegerLevels]:
    """Return the compressors of integers that a compressor is or has."""
    return [part for part in single(compressor) if isinstance(part, IntegerLevels)]


def float_formats(compressor: Compressor) -> list[str]:
    """Return the number formats that a compressor offers, or its parts."""
    return [name for part in single(compressor) if isinstance(part, FloatingPoint) for name in part.formats]


def quantization_config(groups: Mapping[Scheme, Sequence[str]], *, ignore: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``: one group of layers, by full names, for each scheme.

    Args:
        groups: Paths of the layers by scheme.
        ignore: Paths of the linear layers that are not compressed.
    """
    formats = {scheme.format for scheme in groups}
    ordered = sorted(groups.items(), key=lambda item: repr(item[0]))
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {
            f"group_{number}": {"targets": list(paths), "weights": dict(scheme.weights), "format": scheme.format}
            for number, (scheme, paths) in enumerate(ordered)
        },
    }


def decompressed(path: str, tensors: Mapping[str, torch.Tensor], group: Mapping[str, Any]) -> torch.Tensor:
    """Return a layer's weight as compressed-tensors decompresses it, in the type that it chooses.

    Args:
        path: Of the layer.
        tensors: All tensors of the checkpoint.
        group: The layer's entry of ``config_groups``.
    """
    from compressed_tensors.compressors import BaseCompressor  # noqa: PLC0415 - an extra
    from compressed_tensors.quantization import QuantizationScheme  # noqa: PLC0415

    prefix = f"{path}."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    own.pop("bias", None)
    scheme = QuantizationScheme.model_validate(group)
    weight: torch.Tensor = BaseCompressor.get_value_from_registry(group["format"]).decompress(own, scheme)["weight"]
    return weight


def _integers(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Scheme, Tensors]:
    """Return integers: codes, and zeros where there are any, shifted to be signed; codes are packed along the row."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: PLC0415 - an extra

    rows, columns, width, group = (int(meta[key]) for key in ("rows", "columns", "width", "group"))

    def signed(planes: torch.Tensor, count: int) -> torch.Tensor:
        codes = unpack(planes, width, rows * count).view(rows, count)
        return (codes.to(torch.int16) - 2 ** (width - 1)).to(torch.int8)

    found = {
        "weight_packed": pack_to_int32(signed(tensors["codes"], columns), width),
        "weight_scale": tensors["scales"].to(dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if "zeros" in tensors:
        zeros = signed(tensors["zeros"], columns // group)
        found["weight_zero_point"] = pack_to_int32(zeros, width, packed_dim=0)
    symmetric = "zeros" not in tensors
    scheme = Scheme.of(PACKED, num_bits=width, type="int", symmetric=symmetric, strategy="group", group_size=group)
    return scheme, found


def _matrix(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], *, bits: int) -> torch.Tensor:
    """Return the codes of a weight, uint8, shape (rows, columns)."""
    rows = int(meta["rows"])
    columns = int(meta["columns"])
    return unpack(tensors["codes"], bits, rows * columns).view(rows, columns)


def _by_two(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> torch.Tensor:
    """Return codes of four bits, two a byte, the column with the lower index in the low half."""
    codes = _matrix(tensors, meta, bits=4)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _mxfp4(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> tuple[Scheme, Tensors]:
    scheme = _float(4, "mxfp4-pack-quantized", strategy="group", group_size=32, scale_dtype="torch.uint8")
    return scheme, {"weight_packed": _by_two(tensors, meta), "weight_scale": tensors["scales"]}


def _nvfp4(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> tuple[Scheme, Tensors]:
    scheme = _float(
        4, "nvfp4-pack-quantized", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
    )
    return scheme, {
        "weight_packed": _by_two(tensors, meta),
        "weight_scale": tensors["scales"].view(torch.float8_e4m3fn),
        "weight_global_scale": 1 / tensors["whole"].float(),
    }


def _fp8(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> tuple[Scheme, Tensors]:
    codes = _matrix(tensors, meta, bits=ELEMENTS["e4m3"].bits)
    strategy = "channel" if meta["scale"] == "fp32" else "tensor"
    values = {"weight": codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": tensors["scales"]}
    return _float(8, "float-quantized", strategy=strategy), values


def _float(bits: int, name: str, **weights: Any) -> Scheme:
    return Scheme.of(name, num_bits=bits, type="float", symmetric=True, **weights)


WRITERS: Mapping[tuple[str, str], Callable[..., tuple[Scheme, Tensors]]] = {
    ("e2m1", "e8m0"): _mxfp4,
    ("e2m1", "nvfp4"): _nvfp4,
    ("e4m3", "fp32"): _fp8,
    ("e4m3", "layer"): _fp8,
}
"""By element and kind of scale of ``float_blocks``."""
