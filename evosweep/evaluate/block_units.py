"""The units that change each block of a model, as indices into a genome."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import nn

from evosweep.evaluate.routing import levels_in
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import DropEffect
from evosweep.models.slots import Slot
from evosweep.store.manifest import LevelStore

Genomes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockUnits:
    """The units that change one block, as indices into a genome.

    Attributes:
        slots: Index of the unit of each slot.
        writers: Index of the unit that drops a sub-block, by the module whose output is missing then.
        whole: Indices of the units that drop the whole block.
    """

    slots: Mapping[Slot, int]
    writers: Mapping[nn.Module, int]
    whole: tuple[int, ...]

    @cached_property
    def indices(self) -> npt.NDArray[np.int64]:
        return np.array([*self.slots.values(), *self.writers.values(), *self.whole], dtype=np.int64)


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
        found.append(
            BlockUnits(
                slots={slot: indices[slot.name] for slot in anatomy.slots_of(block) if slot.name in indices},
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
    return [(index, level) for index in units.slots.values() for level in levels_in(genomes[:, index])[0]]
