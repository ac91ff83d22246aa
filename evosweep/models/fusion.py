"""Which layers of a model serving engines run as one product, and so load with one width."""

from collections.abc import Sequence

from evosweep.models.anatomy import Anatomy

FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Last parts of the names of layers that vLLM keeps in one parameter: ``packed_modules_mapping`` of its models."""


def fused_layers(anatomy: Anatomy, known: Sequence[Sequence[str]] = FUSED) -> list[tuple[str, ...]]:
    """Return the names of layers that engines fuse, a tuple for each product, in the model's order.

    They are given the same input, stand in the same module, and have names that engines know; a shared input alone is
    not enough, as parallel attention and MLP share theirs. Where a block lacks some of the names, as one that takes its
    keys and values from another block, the others are fused.

    Args:
        anatomy: The model.
        known: Last parts of the names of layers that are fused.
    """
    found: dict[tuple[str, str, int], list[str]] = {}
    for slot in anatomy.slots:
        parent, _, last = slot.name.rpartition(".")
        for index, names in enumerate(known):
            if last in names:
                found.setdefault((slot.group, parent, index), []).append(slot.name)
    return [tuple(layers) for layers in found.values() if len(layers) > 1]
