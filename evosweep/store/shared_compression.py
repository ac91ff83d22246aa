"""Compression of a block's layers by several processes: each compresses some, and all go on with the same weights."""

from collections.abc import Sequence

import torch

from evosweep import parallel
from evosweep.models.slots import Slot
from evosweep.store.manifest_rows import ManifestUnit

Tensors = dict[str, torch.Tensor]
ROWS = "rows"


def shared_out(groups: Sequence[list[Slot]], *, processes: int) -> list[list[list[Slot]]]:
    """Return, by process, which groups of layers it compresses: the longest first, each to who has least to do.

    The time of a group is taken as its rows times its columns squared, and its columns cubed for what its layers share
    (the factorization of GPTQ, arXiv:2210.17323, section 3.3).

    Args:
        groups: Layers that share an input.
        processes: How many there are.
    """
    found: list[list[list[Slot]]] = [[] for _ in range(processes)]
    load = [0] * processes
    for group in sorted(groups, key=_operations, reverse=True):
        least = load.index(min(load))
        found[least].append(group)
        load[least] += _operations(group)
    return found


def _operations(group: Sequence[Slot]) -> int:
    """Return about how many operations the compression of a group takes, up to a factor."""
    columns = group[0].shape[1]
    return columns**3 + sum(slot.shape[0] for slot in group) * columns**2


def gathered(
    slots: Sequence[Slot], rows: Sequence[ManifestUnit], tensors: Tensors, passed_on: Tensors
) -> tuple[list[ManifestUnit], Tensors, Tensors]:
    """Return what all processes made of a block: rows and payloads in the leader, the weights passed on in each.

    Args:
        slots: All compressed layers of the block, which order the rows.
        rows: Of the layers that this process compressed.
        tensors: Their payloads, by name in the file.
        passed_on: Their weights for the blocks after this one, by layer.
    """
    weights = parallel.gather_everywhere(passed_on)
    found = parallel.gather({ROWS: [row.to_json() for row in rows]}, tensors)
    made = {row.name: row for facts, _ in found for row in map(ManifestUnit.from_json, facts[ROWS])}
    payloads = {name: tensor for _, given in found for name, tensor in given.items()}
    device = slots[0].read().device if slots else torch.device("cpu")
    return (
        [made[slot.name] for slot in slots if slot.name in made],
        payloads,
        {slot.name: weights[slot.name].to(device) for slot in slots},
    )
