"""The tensors of a GGUF: the names, the order of rows and the bytes that llama.cpp expects."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from evosweep.compressors.formats import ggml_blocks, grouped_int, plain
from evosweep.compressors.formats.ggml_layout import TYPES, Blocks, pack
from evosweep.compressors.payload import Payload, module_path
from evosweep.core.errors import ExportError
from evosweep.exporters.base import Winner

FROM_CODES = {2: "Q2_0", 4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""The type that holds symmetric codes of a width as they are."""


@dataclass(frozen=True)
class Family:
    """How llama.cpp keeps the models of a family.

    Attributes:
        arch: Its name for them.
        halves: Whether the rows of query and key are kept in another order: its rotary embedding turns neighbours,
            transformers' turns rows half a head apart.
        norm_shift: What is added to the weights of norms.
        rotary: Whether the file says how many numbers of a head are rotated.
        numbered: Whether what a block does follows from its number, so that none may be dropped.
    """

    arch: str
    halves: bool = False
    norm_shift: float = 0.0
    rotary: bool = False
    numbered: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", halves=True, rotary=True),
    "mistral": Family("llama", halves=True, rotary=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", norm_shift=1.0, numbered=True),
}
"""By transformers' ``model_type``."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        name: In llama.cpp.
        data: Its numbers, or its rows of blocks as int8.
        shape: (out, in), or (numbers,).
        number: Of its type in ``ggml_type``.
        kind: Name of its type.
    """

    name: str
    data: np.ndarray
    shape: tuple[int, ...]
    number: int
    kind: str


class Tensors:
    """Makes the tensors of a file out of a winner, while it is ``in_place``.

    Args:
        winner: The allocation.
        family: Of the model.
        expanded: Whether all tensors are numbers of fp32.
    """

    def __init__(self, winner: Winner, family: Family, *, expanded: bool) -> None:
        self.winner = winner
        self.family = family
        self.expanded = expanded
        model: Any = winner.evaluator.anatomy.model
        self.config = model.config.get_text_config()
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self.names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)

    def __iter__(self) -> Iterator[Stored]:
        for path, (_, index) in self.winner.layers().items():
            yield self.of_payload(f"{path}.weight", self._payload(index))
        for name, value in self.winner.others().items():
            if not name.endswith(("inv_freq", "embed_scale")):
                yield self.of_numbers(name, value)

    def _payload(self, index: int) -> Payload:
        stored = self.winner.stored(index)
        return stored.layout.assemble(stored.tensors())

    def of_payload(self, name: str, payload: Payload) -> Stored:
        """Return the tensor of a level: its blocks as they are, or codes and scales as the blocks that hold them.

        Args:
            name: In transformers.
            payload: The level.

        Raises:
            ExportError: No type holds such a level.
        """
        form = module_path(payload.format)
        if self.expanded:
            return self.of_numbers(name, payload.weight)
        if form == plain.__name__:
            return self.of_numbers(name, payload.tensors["weight"])
        if form == ggml_blocks.__name__:
            kind = payload.meta["type"]
            stored = payload.tensors["blocks"]
        elif form == grouped_int.__name__ and "zeros" not in payload.tensors:
            kind, stored = blocks_of_codes(payload)
        else:
            raise ExportError(f"no type of ggml holds the level of {name}; export.type=f32 writes its values")
        shape = (int(payload.meta["rows"]), int(payload.meta["columns"]))
        stored = self._reordered(name, stored).cpu().contiguous()
        if kind in ggml_blocks.PLAIN:
            return self._stored(name, stored.view(torch.int8).numpy(), shape, ggml_blocks.PLAIN_NUMBERS[kind], kind)
        return self._stored(name, stored.view(torch.int8).numpy(), shape, TYPES[kind].number, kind)

    def of_numbers(self, name: str, value: torch.Tensor) -> Stored:
        """Return a tensor in its own type; vectors, and what is expanded, in fp32, as llama.cpp wants them.

        Args:
            name: In transformers.
            value: The tensor.
        """
        value = self._reordered(name, value.detach()).cpu()
        if value.dim() == 1 or self.expanded:
            value = value.float() + (self.family.norm_shift if name.endswith("norm.weight") else 0.0)
        kind = next(kind for kind, dtype in ggml_blocks.PLAIN.items() if dtype is value.dtype)
        shape = tuple(value.shape)
        data = value.contiguous().view(torch.int8).numpy()
        return self._stored(name, data, shape, ggml_blocks.PLAIN_NUMBERS[kind], kind)

    def _reordered(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of query and key as the family's file has them; other tensors as they are."""
        module = name.rpartition(".")[0]
        if not self.family.halves or not module.endswith(("q_proj", "k_proj")):
            return rows
        query = module.endswith("q_proj")
        heads = self.config.num_attention_heads if query else self.config.num_key_value_heads
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def _stored(self, name: str, data: np.ndarray, shape: tuple[int, ...], number: int, kind: str) -> Stored:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"llama.cpp has no place for {name} in its {self.family.arch} models")
        return Stored(found, data, shape, number, kind)


def blocks_of_codes(payload: Payload) -> tuple[str, torch.Tensor]:
    """Return the type that holds symmetric codes and their scales bit for bit, and the rows' blocks, uint8.

    Raises:
        ExportError: There is none: other widths, or groups that are no whole number of blocks.
    """
    rows, columns, width, group = (int(payload.meta[key]) for key in ("rows", "columns", "width", "group"))
    name = FROM_CODES.get(width)
    if name is None or group % TYPES[name].block:
        raise ExportError(f"no type of ggml holds codes of {width} bits in groups of {group}")
    kind = TYPES[name]
    codes = grouped_int.unpack(payload.tensors["codes"], width, rows * columns).view(-1, kind.block).int()
    scales = payload.tensors["scales"].repeat_interleave(group // kind.block, dim=1).flatten()
    if width == 2:  # −2 .. 1 times a scale are 2 .. −1 times its negative
        codes, scales = 3 - codes, -scales
    if width == 8:
        codes = codes - 1  # its middle is 127 here
    return name, pack(Blocks(codes, scales), name).view(rows, -1)
