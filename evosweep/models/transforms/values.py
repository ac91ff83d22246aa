"""Rotation of value heads: values are multiplied with an orthogonal matrix, the output projection with its inverse.

An attention's output is linear in its values, so every head's may be rotated (QuaRot, arXiv 2404.00456, section 4).
Where the values are among a layer's outputs is tried out: on the wrong rows, a rotation changes the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evosweep.models.slots import LinearSlot
from evosweep.models.transforms.wiring import Wiring

Changed = Callable[[], bool]
Rotation = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Heads:
    """The shape of a model's attention.

    Attributes:
        queries: Number of query heads.
        values: Number of key and value heads.
        width: Numbers in each head.
    """

    queries: int
    values: int
    width: int

    @classmethod
    def candidates(cls, model: nn.Module, hidden: int) -> list["Heads"]:
        """Return the shapes that a model's config allows, the likeliest first."""
        config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        queries = getattr(config, "num_attention_heads", None)
        if not isinstance(queries, int) or queries < 1:
            return []
        width = getattr(config, "head_dim", None) or hidden // queries
        groups = [getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")]
        values = dict.fromkeys([*(group for group in groups if isinstance(group, int)), queries, 1])
        return [cls(queries, group, int(width)) for group in values if group > 0 and queries % group == 0]


@dataclass(frozen=True)
class ValuePath:
    """Which rows of one layer are values, and which layer of the same block reads them.

    Attributes:
        source: Path of the layer with the values among its outputs, from the block on.
        target: Path of the output projection, from the block on.
        rows: Indices of the values in the source's outputs, head by head.
        width: Of a head.
    """

    source: str
    target: str
    rows: torch.Tensor
    width: int


def find_value_path(
    model: nn.Module, wiring: Wiring, slots: Sequence[LinearSlot], changed: Changed, rotation: Rotation
) -> ValuePath | None:
    """Return where the values of a model are, found by rotating candidates of its first block; None: nowhere.

    Args:
        model: A causal language model.
        wiring: Of this model.
        slots: All linear layers of one block.
        changed: Whether the model's logits are no longer what they were.
        rotation: Returns an orthogonal matrix of a size, float64.
    """
    targets = [slot for slot in slots if slot.name in {writer.name for writer in wiring.writers}]
    readers = [slot for slot in slots if slot.name not in {target.name for target in targets}]
    for heads in Heads.candidates(model, wiring.hidden):
        for target in targets:
            if target.shape[1] != heads.queries * heads.width:
                continue
            for source in reversed(readers):
                for rows in _rows(source.shape[0], heads):
                    path = ValuePath(_inside(source), _inside(target), rows, heads.width)
                    if _works(source, target, path, rotation(heads.width), changed):
                        return path
    return None


def _works(source: LinearSlot, target: LinearSlot, path: ValuePath, rotation: torch.Tensor, changed: Changed) -> bool:
    """Return whether rotating along a path leaves the logits as they are, and half of it does not; undo it."""
    tensors = [p for slot in (source, target) for p in slot.module.parameters(recurse=False)]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        rotate_target(target, rotation)
        matters = changed()
        rotate_source(source, path, rotation)
        return matters and not changed()
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


def rotate_source(slot: LinearSlot, path: ValuePath, rotation: torch.Tensor) -> None:
    """Multiply the values among a layer's outputs, head by head, with an orthogonal matrix, in place.

    Args:
        slot: The layer.
        path: Which of its rows are values.
        rotation: Shape (width, width), float64.
    """
    bias: Any = getattr(slot.module, "bias", None)
    rows = path.rows.to(slot.read().device)
    matrix = rotation.to(rows.device)
    weight = slot.read().detach().double()
    heads = weight[rows].view(-1, path.width, weight.shape[1])
    weight[rows] = (matrix.T @ heads).reshape(len(rows), -1)
    slot.write(weight)
    if bias is not None:
        with torch.no_grad():
            values = bias.detach().double()
            values[rows] = (values[rows].view(-1, path.width) @ matrix).reshape(-1)
            bias.copy_(values)


def rotate_target(slot: LinearSlot, rotation: torch.Tensor) -> None:
    """Multiply an output projection with the inverse, head by head, in place."""
    weight = slot.read().detach().double()
    heads = weight.view(len(weight), -1, len(rotation))
    slot.write((heads @ rotation.to(weight.device)).reshape(weight.shape))


def _rows(outputs: int, heads: Heads) -> list[torch.Tensor]:
    """Return where the values may be among a layer's outputs: all of them, the last third, or last in every group."""
    size = heads.values * heads.width
    if outputs == size:
        return [torch.arange(outputs)]
    if outputs == heads.queries * heads.width + 2 * size:
        grouped = torch.arange(outputs).view(heads.values, -1, heads.width)[:, -1].reshape(-1)
        return [torch.arange(outputs - size, outputs), grouped]
    return []


def _inside(slot: LinearSlot) -> str:
    """Return the path of a slot from its block on."""
    parts = slot.name.split(".")
    return ".".join(parts[parts.index(str(slot.block)) + 1 :])
