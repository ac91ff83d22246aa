"""Finds the mixtures of experts in a model's blocks: every expert's matrix is a slot."""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from evosweep.models.expert_slots import ExpertSlot, GroupedSlot, ListedSlot, PackedSlot, RoutedSlot
from evosweep.models.listed import ListedMixture
from evosweep.models.mixture import attributes, count, is_swapped, up_attribute
from evosweep.models.packed_experts import KINDS, PackedMixture, kind_of
from evosweep.models.slots import LinearSlot, Slot, slot_kind

LISTED = re.compile(r"^(?!.*shared).*expert", re.IGNORECASE)  # name of a list of experts, or their class


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


def find_listed(model: nn.Module, block_path: str) -> list[ListedMixture]:
    """Return the mixtures in a model's blocks whose experts are modules in a list: each alike, of linear layers.

    Args:
        model: A causal language model of transformers.
        block_path: Path of its list of blocks.
    """
    found = []
    for path, module in model.named_modules():
        if path.startswith(f"{block_path}.") and isinstance(module, nn.ModuleList | nn.ModuleDict):
            experts = tuple(module.children())
            layers = _layers_of(experts)
            named = LISTED.match(path.rpartition(".")[2]) or LISTED.match(type(experts[0]).__name__ if experts else "")
            routes = type(module).forward is not nn.Module.forward
            around = path if routes else path.rpartition(".")[0]
            if layers and named and around.count(".") > block_path.count(".") + 1:  # inside of a block
                paths = tuple(f"{path}.{key}" for key, _ in module.named_children())
                found.append(
                    ListedMixture(around, model.get_submodule(around), paths, experts, layers, _active(model, path))
                )
    return found


def find_packed(model: nn.Module, block_path: str) -> dict[str, list[str]]:
    """Return the modules in a model's blocks that keep the matrices of all experts in a shape of their own.

    Args:
        model: A causal language model of transformers.
        block_path: Path of its list of blocks.

    Returns:
        Paths of the modules around each of them in its block, the nearest first: one of these routes.
    """
    depth = block_path.count(".") + 2
    found = {}
    for path, module in model.named_modules():
        if path.startswith(f"{block_path}.") and kind_of(module) is not None:
            parts = path.split(".")
            found[path] = [".".join(parts[:end]) for end in range(len(parts) - 1, depth, -1)]
    return found


def packed_mixtures(model: nn.Module, found: Mapping[str, Sequence[str]], ran: Collection[str]) -> list[PackedMixture]:
    """Return the mixtures of modules that keep the matrices of all experts.

    Args:
        model: The model.
        found: What ``find_packed`` returned.
        ran: Paths of modules whose forward ran.
    """
    owners: dict[str, dict[str, nn.Module]] = {}
    for path, outer in found.items():
        around = next((name for name in outer if name in ran), None)
        if around is not None:
            owners.setdefault(around, {})[path.removeprefix(f"{around}.")] = model.get_submodule(path)
    return [
        PackedMixture(around, model.get_submodule(around), inside, _active(model, f"{around}.{next(iter(inside))}"))
        for around, inside in owners.items()
    ]


def packed_slots(mixture: PackedMixture, block: int) -> list[Slot]:
    """Return the matrices of all experts that are kept in a shape of their own.

    Args:
        mixture: The mixture.
        block: Index of its decoder block.
    """
    found: list[Slot] = []
    for path, module in mixture.owners.items():
        kind = KINDS[type(module).__name__]
        count = kind.count(module)
        found += [
            PackedSlot(
                name=f"{mixture.name}.{path}.{expert}.{name}",
                block=block,
                module=module,
                group=f"{mixture.name}.{path}.{expert}.{kind.leader[name]}",
                attribute=f"{path}.{name}",
                expert=expert,
                share=mixture.active / count,
                packed=mixture,
            )
            for name in kind.swapped
            for expert in range(count)
        ]
    return found


def _layers_of(experts: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the paths of the linear layers of some experts; none where they are not alike, or more than layers."""
    if len(experts) < 2 or len({type(expert) for expert in experts}) > 1:
        return ()
    found = []
    for expert in experts:
        owners = {name.rpartition(".")[0] for name, _ in expert.named_parameters()}
        plain = [name for name in owners if _is_plain(expert.get_submodule(name))]
        found.append({name: expert.get_parameter(f"{name}.weight".lstrip(".")).shape for name in plain})
        if len(plain) < len(owners):
            return ()
    order = [name for name, _ in experts[0].named_modules() if name in found[0]]
    return tuple(order) if all(shapes == found[0] for shapes in found) else ()


def _is_plain(module: nn.Module) -> bool:
    return slot_kind(module) is LinearSlot and type(module).forward is nn.Linear.forward


def listed_slots(mixture: ListedMixture, block: int, width: int) -> list[Slot]:
    """Return the matrices of all experts of a list; none where an expert does not run on hidden states alone.

    Args:
        mixture: The mixture.
        block: Index of its decoder block.
        width: Of the hidden states.
    """
    leaders = _inputs_in(mixture.experts[0], mixture.layers, width)
    if leaders.keys() != set(mixture.layers):
        return []
    share = mixture.active / len(mixture.experts)
    return [
        ListedSlot(
            name=f"{path}.{layer}",
            block=block,
            module=expert.get_submodule(layer),
            group=f"{path}.{leader}",
            attribute=layer,
            expert=index,
            share=share,
            listed=mixture,
        )
        for layer, leader in leaders.items()
        for index, (path, expert) in enumerate(zip(mixture.paths, mixture.experts, strict=True))
    ]


def _inputs_in(expert: nn.Module, layers: Sequence[str], width: int) -> dict[str, str]:
    """Return by layer, in the order in which they run, the first that has the same input; nothing if it does not run.

    Args:
        expert: The expert.
        layers: Paths of its layers.
        width: Of the hidden states that it is given.
    """
    inputs: dict[str, torch.Tensor] = {}

    def _remember(layer: str, _module: nn.Module, args: Sequence[torch.Tensor]) -> None:
        inputs.setdefault(layer, args[0])

    weight = next(expert.parameters())
    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(expert.get_submodule(layer).register_forward_pre_hook(partial(_remember, layer)).remove)
        try:
            given = torch.zeros((1, width), dtype=weight.dtype, device=weight.device)
            if not isinstance(expert(given), torch.Tensor):
                return {}
        except Exception:  # whatever a model's own code raises
            return {}
    return {layer: same_input(layer, inputs) for layer in inputs}


def same_input(name: str, inputs: Mapping[str, torch.Tensor]) -> str:
    """Return the first layer that was given the very same tensor as another one.

    Args:
        name: Of that other one.
        inputs: What each layer was given.
    """
    mine = inputs[name]
    return next(
        other
        for other, tensor in inputs.items()
        if tensor is mine or (tensor.data_ptr() == mine.data_ptr() and tensor.shape == mine.shape)
    )


def with_listed(
    slots: Sequence[Slot], mixture: ListedMixture | PackedMixture, experts: Sequence[Slot], order: Sequence[str]
) -> list[Slot]:
    """Return a model's slots with those of a list of experts, behind all others of the module that routes.

    What else is in that module runs in groups of rows, too.

    Args:
        slots: Of the layers that ran, among them perhaps some of the experts.
        mixture: The mixture.
        experts: Its slots; none where its experts do not run alone.
        order: Names of layers and of modules that route, in the order in which they ran.
    """
    if not experts:
        return list(slots)
    around = f"{mixture.name}."
    inside = tuple(f"{path}." for path in mixture.paths)
    others = [slot for slot in slots if not (inside and slot.name.startswith(inside))]
    ran = {*order[: order.index(mixture.name)], *(name for name in order if name.startswith(around))}
    behind = max((index for index, slot in enumerate(others) if slot.name in ran), default=-1) + 1
    grouped = [
        GroupedSlot(slot.name, slot.block, slot.module, slot.group, mixture.module)
        if slot.name.startswith(around) and type(slot) is LinearSlot
        else slot
        for slot in others
    ]
    return [*grouped[:behind], *experts, *grouped[behind:]]


def alike_experts(anatomy: Slots) -> list[tuple[str, ...]]:
    """Return the names of the matrices that do the same in all experts of a mixture, a tuple for each mixture."""
    found: dict[tuple[int, str], list[str]] = {}
    for slot in anatomy.slots:
        if isinstance(slot, RoutedSlot):
            found.setdefault((id(slot.mixture.module), slot.attribute), []).append(slot.name)
    return [tuple(names) for names in found.values()]


def _active(model: nn.Module, path: str) -> int:
    """Return how many experts of a mixture each token goes to."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    around = model.get_submodule(path.rpartition(".")[0])
    outer = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
    names: Sequence[str] = ("top_k", "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk")
    for owner in (around, *around.children(), outer, config):
        for name in names:
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and value > 0:
                return value
    return 1
