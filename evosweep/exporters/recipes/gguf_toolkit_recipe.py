"""Lists of gptq-gguf-toolkit, whose stitcher puts a GGUF file together from tensors of several types.

A line is ``layer: bits (bits-type.pth)``, as its ``evo_quant_search.py`` writes and ``gguf_stitcher.py`` reads them.
"""

from evosweep.exporters.recipes.listing import Listing, Setting
from evosweep.exporters.recipes.llama_cpp_recipe import BITS, ggml_type, notes, refusal

__all__ = ["NAME", "command", "files", "notes", "refusal"]
NAME = "gptq-gguf-toolkit"
FILE = "gptq_gguf_toolkit.txt"
NAMED_BITS = {**BITS, "Q2_K": 2.5625}  # in names of files, as the toolkit's own table has them


def files(listing: Listing) -> dict[str, str]:
    """Return the list."""
    return {FILE: "".join(f"{path}: {_value(setting)}\n" for path, setting in listing.layers.items())}


def command(listing: Listing) -> str:
    """Return the commands that name tensors as in GGUF files and stitch one."""
    del listing
    return (
        f"python mapper/config_converter.py {FILE} --output gguf_names.txt\n"
        "python mapper/gguf_stitcher.py layers-gguf out.gguf --config gguf_names.txt --original-model in-f32.gguf"
    )


def _value(setting: Setting) -> str:
    kind = ggml_type(setting)
    bits = f"{NAMED_BITS[kind]:g}"
    return f"{bits} ({bits}-{kind}.pth)"
