"""Finds the mixtures of experts in a model's blocks: every expert's matrix is a slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from evosweep.models.mixture import attributes, count, is_swapped, up_attribute
from evosweep.models.slots import ExpertSlot, Slot


class Slots(Protocol):
    """A model with slots; anatomy.Anatomy is one."""

    @property
    def slots(self) -> list[Slot]: ...


@dataclass(frozen=True)
class Mixture:
    """A module that keeps the matrices of all experts of a layer as 3-D parameters.

    Attributes:
        name: Path in the model.
        block: Index of its decoder block.
        module: The module.
        active: How many experts each token goes to.
    """

    name: str
    block: int
    module: nn.Module
    active: int

    @property
    def experts(self) -> int:
        """Number of experts."""
        return count(self.module)

    @property
    def slots(self) -> list[Slot]:
        """The matrices of all experts, in the order in which they are used."""
        return [
            ExpertSlot(
                name=f"{self.name}.{expert}.{attribute}",
                block=self.block,
                module=self.module,
                group=f"{self.name}.{expert}.{attribute}",
                attribute=attribute,
                expert=expert,
                swapped=is_swapped(self.module),
                share=self.active / self.experts,
            )
            for attribute in attributes(self.module)
            for expert in range(self.experts)
        ]


def find_mixtures(model: nn.Module, block_path: str) -> dict[str, Mixture]:
    """Return the mixtures of experts in a model's blocks, by path.

    Args:
        model: A causal language model of transformers.
        block_path: Path of its list of blocks.
    """
    found = {}
    for path, module in model.named_modules():
        if path.startswith(f"{block_path}.") and up_attribute(module) is not None:
            block = int(path.removeprefix(f"{block_path}.").split(".")[0])
            found[path] = Mixture(path, block, module, _active(model, path))
    return found


def alike_experts(anatomy: Slots) -> list[tuple[str, ...]]:
    """Return the names of the matrices that do the same in all experts of a mixture, a tuple for each mixture."""
    found: dict[tuple[int, str], list[str]] = {}
    for slot in anatomy.slots:
        if isinstance(slot, ExpertSlot):
            found.setdefault((id(slot.module), slot.attribute), []).append(slot.name)
    return [tuple(names) for names in found.values()]


def _active(model: nn.Module, path: str) -> int:
    """Return how many experts of a mixture each token goes to."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    around = model.get_submodule(path.rpartition(".")[0])
    names: Sequence[str] = ("top_k", "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk")
    for owner in (around, *around.children(), config):
        for name in names:
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and value > 0:
                return value
    return 1
