"""The layers of a model replaced so that each row of a population runs at its own levels: a block, or all blocks.

All blocks at once are for models whose blocks cannot be run one by one: all candidates are one batch through the
model's own forward, and those that are equal share a row. That costs more than block by block, where candidates share
the blocks before their first difference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evosweep.evaluate.block_units import BlockUnits
from evosweep.evaluate.level_weights import LevelWeights
from evosweep.evaluate.outer import OuterUnits
from evosweep.evaluate.routing import distinct_rows, groups_of
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved
from evosweep.models.patch import replaced_forward
from evosweep.models.rows import own_forward_by_row, passed_by
from evosweep.models.sublayers import silenced_rows

Indices = npt.NDArray[np.int64]
Rounded = Callable[[Mapping[str, torch.nn.Module]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Replaced:
    """Makes layers treat each row of a population at its own levels.

    Attributes:
        anatomy: The dense model.
        levels: Weights of all levels.
        blocks: Units of every block.
        outer: Units outside of the blocks.
        rounded: Returns a context in which the inputs of some layers are rounded.
        majority: As for ``routing.groups_of``.
    """

    anatomy: Anatomy
    levels: LevelWeights
    blocks: Sequence[BlockUnits]
    outer: OuterUnits
    rounded: Rounded
    majority: float | None = None

    @contextmanager
    def block(self, index: int, levels: Mapping[int, Indices], rows: int, *, lazy: bool = False) -> Iterator[None]:
        """Let the layers of a block treat each row at its own levels while the context lasts.

        Args:
            index: Of the block.
            levels: Level of each row, by index of the unit.
            rows: Number of rows; the batch holds equally many sequences a row.
            lazy: Whether weights are decoded when a layer runs, not before.
        """
        units = self.blocks[index]
        with ExitStack() as stack:
            if units.slots:
                stack.enter_context(self.rounded({slot.name: slot.module for slot in units.slots}))
                wanted = np.stack([levels[unit] for unit in units.slots.values()])
                groups_by_slot = groups_of(wanted, self.anatomy.device, majority=self.majority)
                for (slot, unit), groups in zip(units.slots.items(), groups_by_slot, strict=True):
                    weights = WeightsOfUnit(self.levels, unit, groups.levels)
                    stack.enter_context(slot.forward_by_row(groups, weights if lazy else dict(weights)))
            stack.enter_context(units.experts_at(levels, self.levels.weight))
            for module, unit in units.writers.items():
                gone = np.flatnonzero(levels[unit] == 0)
                if len(gone):
                    stack.enter_context(silenced_rows(module, gone, rows))
            yield

    def through_model(self, genomes: Indices, tokens: torch.Tensor) -> tuple[torch.Tensor, Indices]:
        """Return final hidden states (distinct genomes, windows, seq_len, hidden), and each genome's row in them.

        Args:
            genomes: Level indices (genomes, units).
            tokens: Token ids (windows, seq_len).
        """
        first, rows = distinct_rows(self.outer.without_head(genomes))
        distinct = genomes[first]
        with ExitStack() as stack:
            stack.enter_context(self._embedding(distinct))
            for block, units in enumerate(self.blocks):
                levels = {unit: distinct[:, unit] for unit in units.indices.tolist()}
                stack.enter_context(self.block(block, levels, len(distinct), lazy=True))
                gone = np.flatnonzero(np.any([levels[unit] == 0 for unit in units.whole], axis=0))
                if len(gone):
                    on_device = moved(gone, self.anatomy.device)
                    stack.enter_context(passed_by(self.anatomy.blocks[block], on_device, len(distinct)))
            final = self.anatomy.run_whole(tokens.repeat(len(distinct), 1))
        return final.unflatten(0, (len(distinct), len(tokens))), rows

    @contextmanager
    def _embedding(self, genomes: Indices) -> Iterator[None]:
        """Let the embedding look up each genome's tokens at its own level while the context lasts."""
        unit = self.outer.embedding
        if unit is None:
            yield
            return
        module = self.anatomy.outer["embedding"].module
        (groups,) = groups_of(genomes[:, unit][None], self.anatomy.device)
        weights = WeightsOfUnit(self.levels, unit, groups.levels)
        with replaced_forward(module, own_forward_by_row(module, groups, weights)):
            yield


class WeightsOfUnit(Mapping[int, torch.Tensor]):
    """The weights of one unit by level, decoded when they are read.

    Args:
        levels: Has the weights of all units.
        unit: Index of the unit.
        wanted: Its levels that occur.
    """

    def __init__(self, levels: LevelWeights, unit: int, wanted: Sequence[int]) -> None:
        self.levels = levels
        self.unit = unit
        self.wanted = wanted

    def __getitem__(self, level: int) -> torch.Tensor:
        return self.levels.weight((self.unit, level))

    def __iter__(self) -> Iterator[int]:
        return iter(self.wanted)

    def __len__(self) -> int:
        return len(self.wanted)
