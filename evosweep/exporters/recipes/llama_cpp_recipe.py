r"""Recipes for llama.cpp: a file for ``llama-quantize --tensor-type-file``.

A line is ``regular expression=ggml type``; the first expression that matches a tensor's name wins (llama.cpp,
``tools/quantize/README.md``). The file has no comments: the program splits it at white space.
"""

import re
from functools import lru_cache

import gguf

from evosweep.exporters.recipes.listing import Listing, Setting

NAME = "llama.cpp"
LIST = "tensor-types.txt"
BLOCK = 256  # columns that K types and most IQ types take at once
TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
NARROW = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
"""Where the columns are no multiple of 256: types of 32 columns, of which 4 bits are the fewest."""
NUMBERS = {"mxfp4": "MXFP4", "fp8": "Q8_0", "nvfp4": "Q4_0"}
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes instead of a K type for columns that are no multiple of 256."""
FAMILIES = {"mistral": "llama", "smollm3": "smollm3", "gpt_neox": "gptneox", "qwen3_5": "qwen35"}
BITS = {kind.name: 8 * size / block for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}  # of a weight


def refusal(setting: Setting, family: str) -> str:
    """Return why llama.cpp cannot make a level; empty where it can.

    Args:
        setting: The level.
        family: ``model_type`` of the model.
    """
    if architecture(family) is None:
        return f"gguf {family!r} has no tensor names for"
    return "" if ggml_type(setting) else f"no ggml type is near {setting}"


def files(listing: Listing) -> dict[str, str]:
    """Return the file of tensor types."""
    lines = []
    for path, setting in listing.layers.items():
        name = re.escape(f"{tensor_name(path, listing.family, listing.blocks)}.weight")
        lines.append(f"{name}={_spelled(ggml_type(setting))}\n")
    return {LIST: "".join(lines)}


def command(listing: Listing) -> str:
    """Return the commands that convert the base model and quantize it."""
    types = [ggml_type(setting) for setting in listing.layers.values()]
    base = max(sorted(set(types)), key=types.count)
    base = base if base.endswith(("_0", "_1")) else f"{base}_S" if base in ("Q3_K", "Q4_K", "Q5_K") else base
    outer = {
        tensor_name(path, listing.family, listing.blocks): _spelled(ggml_type(setting))
        for path, setting in listing.layers.items()
    }
    embedding = outer.get("token_embd", "f16")
    head = outer.get("output", "f16")
    return (
        f"python convert_hf_to_gguf.py {listing.model} --outtype f32 --outfile in-f32.gguf\n"
        f"llama-quantize --tensor-type-file {LIST} --token-embedding-type {embedding} --output-tensor-type {head} "
        f"in-f32.gguf out.gguf {base}"
    )


def notes(listing: Listing) -> list[str]:
    """Return which ggml type was taken for which level, a line a pair."""
    pairs: dict[tuple[str, str], int] = {}
    for setting in listing.layers.values():
        key = (str(setting), ggml_type(setting))
        pairs[key] = pairs.get(key, 0) + 1
    return [
        f"{text} -> {kind} ({BITS[kind]:g} bits a weight): {count} layers"
        for (text, kind), count in sorted(pairs.items())
        if text != kind
    ]


def ggml_type(setting: Setting) -> str:
    """Return the ggml type that is nearest to a level; empty if none is."""
    if setting.dense:
        return "F16"
    whole = setting.columns % BLOCK == 0
    if setting.ggml:
        return setting.ggml if whole else FALLBACKS.get(setting.ggml, setting.ggml)
    if setting.bits is not None:
        return (TYPES if whole else NARROW).get(setting.bits, "")
    return NUMBERS.get(setting.number, "")


def architecture(family: str) -> gguf.MODEL_ARCH | None:
    """Return ggml's name of a model family; None if it knows no such family."""
    name = FAMILIES.get(family, family).removesuffix("_text").replace("_", "")
    found = {known.replace("-", "").replace("_", ""): kind for kind, known in gguf.MODEL_ARCH_NAMES.items()}
    return found.get(name)


def tensor_name(path: str, family: str, blocks: int) -> str:
    """Return ggml's name of a layer, without ``.weight``; the path itself where it has none.

    Args:
        path: In the model.
        family: ``model_type`` of the model.
        blocks: Number of its blocks.
    """
    return _names(family, blocks).get_name(path) or path


@lru_cache
def _names(family: str, blocks: int) -> gguf.TensorNameMap:
    kind = architecture(family)
    assert kind is not None
    return gguf.get_tensor_name_map(kind, blocks)


def _spelled(kind: str) -> str:
    """Return a type as llama.cpp's own documentation writes it: ``q3_K``."""
    return kind.lower().replace("_k", "_K")
