"""Names of tensors and types in GGUF files, for allocations that are read from such files and from lists of them."""

import re
from collections.abc import Iterable
from pathlib import Path

from evosweep.core.errors import EvosweepError
from evosweep.core.unit import Unit

BLOCK = "blk."  # begins the names of tensors in blocks
WEIGHT = ".weight"
NAMED = re.compile(r"\(?[\d.]*-?([A-Za-z][A-Za-z0-9_]*?)(?:\.pth)?\)?")  # as (2.5625-Q2_K.pth), or a type alone
TYPE = re.compile(r"(?:U?I?Q|TQ|MXFP|NVFP|BF|F)(\d+)(?:_\w+)?", re.IGNORECASE)
FAMILY = "llama"  # most families have its names of tensors


def ggml_type(value: str) -> str:
    """Return the ggml type that a list's value names, in capitals; empty if it names none.

    Args:
        value: ``Q2_K``, or as gptq-gguf-toolkit writes it, ``2.5625 (2.5625-Q2_K.pth)``.
    """
    last = value.rsplit(maxsplit=1)[-1] if value.split() else ""
    match = NAMED.fullmatch(last)
    return match[1].upper() if match and TYPE.fullmatch(match[1]) else ""


def level_of_type(unit: Unit, kind: str) -> int | None:
    """Return the index of the level that a ggml type stands for; None if the unit has no widths.

    That is the level which is called so, else the one whose width is nearest to the type's, the wider of two.

    Args:
        unit: Has the levels.
        kind: A ggml type in capitals.
    """
    names = [name.upper() for name in unit.level_names]
    if kind in names:
        return names.index(kind)
    match = TYPE.fullmatch(kind)
    widths = {
        index: level.nominal.number
        for index, level in enumerate(unit.levels)
        if level.nominal is not None and level.nominal.kind in ("bits", "bits_per_weight")
    }
    if match is None or not widths:
        return None
    wanted = float(match[1])
    return min(widths, key=lambda index: (abs(widths[index] - wanted), -widths[index]))


def layer_names(layers: Iterable[str], *, family: str = FAMILY) -> dict[str, str]:
    """Return the layer of every tensor name, for the layers that ggml has names for.

    Args:
        layers: Paths in the model, ``model.layers.0.self_attn.q_proj``.
        family: ``general.architecture`` of a file.

    Raises:
        EvosweepError: The installed gguf does not know the family.
    """
    import gguf  # noqa: PLC0415 - only allocations of GGUF files need it

    layers = list(layers)
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if family not in known:
        raise EvosweepError(f"gguf knows no tensor names of {family!r}; a newer gguf may: pip install --upgrade gguf")
    blocks = 1 + max((int(number) for name in layers for number in re.findall(r"\.(\d+)\.", name)), default=0)
    names = gguf.get_tensor_name_map(known[family], blocks)
    found = {names.get_name(layer): layer for layer in layers}
    return {f"{tensor}{WEIGHT}": layer for tensor, layer in found.items() if tensor is not None}


def read_types(path: Path, layers: Iterable[str]) -> dict[str, str]:
    """Return the ggml type of every layer in a GGUF file.

    Args:
        path: Of the file.
        layers: Paths in the model.

    Raises:
        EvosweepError: The file cannot be read, is no GGUF file, or lacks a layer.
    """
    import gguf  # noqa: PLC0415

    layers = list(layers)
    try:
        reader = gguf.GGUFReader(path)
        family = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EvosweepError(f"{path} is not a GGUF file that can be read: {error}") from error
    layer_of = layer_names(layers, family=family)
    found = {layer_of[one.name]: one.tensor_type.name for one in reader.tensors if one.name in layer_of}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise EvosweepError(
            f"{path} has no tensor for {len(missing)} of {len(layers)} layers ({missing[0]} ...): it is a file of "
            f"another model ({family}), or of a part of it"
        )
    return found
