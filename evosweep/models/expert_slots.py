"""Slots of experts, and of layers beside them: a router sends them some tokens of some rows."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from evosweep.core.errors import ModelError
from evosweep.models.grouped_rows import in_groups
from evosweep.models.listed import ListedMixture
from evosweep.models.mixture import FusedMixture, attributes, is_swapped, up_attribute
from evosweep.models.packed_experts import PackedMixture, kind_of, packed_view
from evosweep.models.routing_types import Routed, Rows
from evosweep.models.slots import EmbeddingSlot, LinearSlot, RowGroups, slot_kind


@dataclass(frozen=True)
class GroupedSlot(LinearSlot):
    """The weight of an nn.Linear in a module that routes: rows with the same levels run through that together.

    Attributes:
        around: The module that routes.
    """

    around: nn.Module | None = None

    def forward_by_row(self, groups: RowGroups, weights: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
        """Return a context in which each row of the batch is multiplied with the weight of its own level."""
        rows = Rows(levels_of(groups), weights.__getitem__)
        return in_groups(self.around or self.module, {(self.module, "weight", 0): rows})


@dataclass(frozen=True)
class RoutedSlot(LinearSlot):
    """One expert's matrix in a mixture: it is given only the tokens that a router sends to the expert.

    Attributes:
        attribute: Which of the expert's matrices this is.
        expert: Index of the expert.
        share: Share of the tokens that go to one of the experts, on average.
    """

    attribute: str = "down_proj"
    expert: int = 0
    share: float = 1.0

    @property
    def mixture(self) -> Routed:
        """The mixture that the expert is in."""
        raise NotImplementedError

    def forward_by_row(self, groups: RowGroups, weights: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
        """Return a context in which each row's tokens that go to this expert meet the weight of their row's level."""
        return self.mixture.by_row({(self.attribute, self.expert): Rows(levels_of(groups), weights.__getitem__)})


@dataclass(frozen=True)
class ListedSlot(RoutedSlot):
    """The weight of an nn.Linear of an expert that is a module by itself.

    Attributes:
        listed: The mixture; ``attribute`` is the layer's path in its expert.
    """

    listed: ListedMixture | None = None

    @property
    def mixture(self) -> Routed:
        """The mixture that the expert is in."""
        if self.listed is None:
            raise ModelError(f"{self.name} is in no mixture")
        return self.listed


@dataclass(frozen=True)
class PackedSlot(RoutedSlot):
    """One expert's matrix in a parameter that holds those of all experts in a shape of its own.

    Attributes:
        packed: The mixture.
    """

    packed: PackedMixture | None = None
    layout = "expert"

    @property
    def _parameter(self) -> str:
        return self.attribute.rpartition(".")[2]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter of all experts."""
        return getattr(self.module, self._parameter)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this expert's (out, in) view of a tensor laid out as ``parameter``."""
        return packed_view(self.module, self._parameter, self.expert, tensor)

    def path_at(self, module: str) -> str:
        """Return the slot's path in a model that has the module with the parameter at ``module``."""
        return f"{module}.{self.expert}.{self._parameter}"

    @property
    def mixture(self) -> Routed:
        """The mixture that the expert is in."""
        if self.packed is None:
            raise ModelError(f"{self.name} is in no mixture")
        return self.packed

    def watch_inputs(self, callback: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Raise ModelError, as an ``ExpertSlot`` does."""
        raise ModelError(f"{self.name}: the inputs of a single expert are measured with all of its mixture")


@dataclass(frozen=True)
class ExpertSlot(RoutedSlot):
    """One expert's matrix in a parameter that holds all experts of a mixture as (experts, out, in).

    Attributes:
        swapped: Whether the parameter is (experts, in, out) instead.
    """

    swapped: bool = False
    layout = "expert"

    @property
    def mixture(self) -> Routed:
        """The mixture that the expert is in."""
        return FusedMixture(self.module)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter of all experts."""
        return getattr(self.module, self.attribute)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this expert's (out, in) view of a tensor laid out as ``parameter``."""
        return tensor[self.expert].T if self.swapped else tensor[self.expert]

    def path_at(self, module: str) -> str:
        """Return the slot's path in a model that has the slot's mixture at ``module``."""
        return f"{module}.{self.expert}.{self.attribute}"

    def watch_inputs(self, callback: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Raise ModelError: the module's inputs are those of all experts; see ``mixture.watched_experts``."""
        raise ModelError(f"{self.name}: the inputs of a single expert are measured with all of its mixture")


def slot_at(model: nn.Module, path: str) -> LinearSlot:
    """Return the slot of the module at a path of a model, outside of any anatomy.

    Raises:
        ModelError: The model has no module there, or one without a slot.
    """
    expert = _expert_at(model, path)
    if expert is not None:
        return expert
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {path}") from error
    kind = EmbeddingSlot if isinstance(module, nn.Embedding) else slot_kind(module)
    if kind is None:
        raise ModelError(f"{path} is a {type(module).__name__}, not a linear layer")
    return kind(name=path, block=0, module=module, group=path)


def _expert_at(model: nn.Module, path: str) -> RoutedSlot | None:
    """Return the slot of an expert of a mixture at ``path of the mixture.index.attribute``; None: there is none."""
    around, _, attribute = path.rpartition(".")
    mixture, _, number = around.rpartition(".")
    try:
        module = model.get_submodule(mixture)
    except AttributeError:
        return None
    kind = kind_of(module)
    if number.isdecimal() and kind is not None and attribute in kind.swapped:
        return PackedSlot(path, 0, module, path, attribute=attribute, expert=int(number))
    if not number.isdecimal() or up_attribute(module) is None or attribute not in attributes(module):
        return None
    return ExpertSlot(path, 0, module, path, attribute=attribute, expert=int(number), swapped=is_swapped(module))


def levels_of(groups: RowGroups) -> npt.NDArray[np.int64]:
    """Return the level of each row, shape (rows,)."""
    levels = np.full(groups.rows, groups.levels[0], dtype=np.int64)
    for level, members in zip(groups.levels[1:], groups.members[1:], strict=True):
        levels[members.cpu().numpy()] = level
    return levels
