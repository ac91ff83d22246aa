"""The units that change each block of a model, as indices into a genome."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evosweep.evaluate.routing import levels_in
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import DropEffect
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.routing_types import Routed, Rows
from evosweep.models.slots import Slot
from evosweep.store.manifest import LevelStore

Genomes = npt.NDArray[np.int64]
Levels = npt.NDArray[np.int64]
Key = tuple[int, int]


@dataclass(frozen=True)
class BlockUnits:
    """The units that change one block, as indices into a genome.

    Attributes:
        slots: Index of the unit of each slot of a layer.
        experts: Index of the unit of each expert's matrix.
        writers: Index of the unit that drops a sub-block, by the module whose output is missing then.
        whole: Indices of the units that drop the whole block.
    """

    slots: Mapping[Slot, int]
    writers: Mapping[nn.Module, int]
    whole: tuple[int, ...]
    experts: Mapping[RoutedSlot, int] = field(default_factory=dict)

    @cached_property
    def indices(self) -> npt.NDArray[np.int64]:
        found = [*self.slots.values(), *self.experts.values(), *self.writers.values(), *self.whole]
        return np.array(found, dtype=np.int64)

    @contextmanager
    def experts_at(self, levels: Mapping[int, Levels], weight: Callable[[Key], torch.Tensor]) -> Iterator[None]:
        """Multiply the tokens of each row with the experts' weights of its own levels while the context lasts.

        Args:
            levels: Level of each row, by index of the unit.
            weight: Weight (out, in) by index of the unit, and level; decoded when an expert runs.
        """
        mixtures: dict[Routed, dict[tuple[str, int], Rows]] = {}
        for slot, unit in self.experts.items():
            rows = Rows(levels[unit], lambda level, unit=unit: weight((unit, level)))  # type: ignore[misc]
            mixtures.setdefault(slot.mixture, {})[slot.attribute, slot.expert] = rows
        with ExitStack() as stack:
            for mixture, rows_of in mixtures.items():
                stack.enter_context(mixture.by_row(rows_of))
            yield


def units_by_block(anatomy: Anatomy, store: LevelStore, drops: Mapping[int, DropEffect]) -> list[BlockUnits]:
    """Return the units that change each block.

    Args:
        anatomy: The model.
        store: Its level store.
        drops: What dropping does, by index of the unit.
    """
    indices = {unit.name: index for index, unit in enumerate(store.units)}
    found = []
    for block in range(len(anatomy.blocks)):
        here = {index: effect for index, effect in drops.items() if block in effect.blocks}
        slots = {slot: indices[slot.name] for slot in anatomy.slots_of(block) if slot.name in indices}
        found.append(
            BlockUnits(
                slots={slot: index for slot, index in slots.items() if not isinstance(slot, RoutedSlot)},
                experts={slot: index for slot, index in slots.items() if isinstance(slot, RoutedSlot)},
                writers={
                    anatomy.model.get_submodule(effect.writer): index
                    for index, effect in here.items()
                    if effect.writer is not None
                },
                whole=tuple(index for index, effect in here.items() if effect.whole),
            )
        )
    return found


def wanted_levels(units: BlockUnits, genomes: Genomes) -> list[tuple[int, int]]:
    """Return (unit, level) of all levels that a population has in the slots of a block."""
    layers = [*units.slots.values(), *units.experts.values()]
    return [(index, level) for index in layers for level in levels_in(genomes[:, index])[0]]
