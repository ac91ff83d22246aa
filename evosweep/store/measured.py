"""What calibration measures of one block, no more of it at a time than fits memory.

A second moment takes 4 n² bytes for an input of width n, and every expert of a mixture has one for each of its
matrices: 128 experts of width 4096 take 8.6 GB. Where they do not fit together, the block's stored inputs run through
it again for each part of them. Every moment sums the same batches in the same order then, so that it has the same bits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from evosweep import parallel
from evosweep.compressors.statistics import INPUT_SQUARE, SECOND_MOMENT
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import free_bytes
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.slots import Slot
from evosweep.store.outliers import outlier_ratios
from evosweep.store.passage import Passage
from evosweep.store.statistics.walk import measure_inputs
from evosweep.store.weighting import Weighting

MOMENT_SHARE = 0.25  # of free memory that the second moments of experts may take together
MOMENT_ITEM = 4  # bytes
Groups = Sequence[list[Slot]]


@dataclass
class Measured:
    """The statistics of the inputs of one block's layers.

    Attributes:
        anatomy: The model.
        block: Index of the block.
        passage: The calibration text in front of it.
        needs: Names of the statistics.
        weighting: How tokens are weighted.
    """

    anatomy: Anatomy
    block: int
    passage: Passage
    needs: frozenset[str]
    weighting: Weighting
    _found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def chunks(self, groups: Groups) -> Iterator[list[list[Slot]]]:
        """Yield layers that share an input, part by part; ``of`` has the statistics of the part that was yielded last.

        Args:
            groups: The layers.
        """
        parts = self._parts(groups)
        if len(parts) > 1:
            self._measure(frozenset({INPUT_SQUARE}), groups)
        for number, part in enumerate(parts):
            for members in parts[number - 1] if number else ():
                self._found[members[0].group] = {}
            self._measure(self.needs, part)
            yield part

    def of(self, group: str) -> Mapping[str, Any]:
        """Return the statistics of a shared input by name."""
        return self._found[group]

    def outlier_ratios(self, slots: Sequence[Slot]) -> dict[str, dict[str, float]]:
        """Return each layer's shares of outlier weights; known once ``chunks`` has begun.

        Args:
            slots: All compressed layers of the block.
        """
        return outlier_ratios({slot.name: (slot.read, self._found[slot.group][INPUT_SQUARE]) for slot in slots})

    def _measure(self, needs: Collection[str], groups: Groups) -> None:
        found = measure_inputs(
            self.anatomy,
            self.block,
            self.passage.hidden,
            tokens=self.passage.tokens,
            needs=needs,
            weighting=self.weighting,
            among={members[0].group for members in groups},
        )
        for group, statistics in found.items():
            self._found.setdefault(group, {}).update(statistics)

    def _parts(self, groups: Groups) -> list[list[list[Slot]]]:
        """Return layers that share an input in parts whose second moments fit, all that are no experts in the first.

        All processes get the same parts: their sums are added up.
        """
        single = [members for members in groups if isinstance(members[0], RoutedSlot)]
        parts = [[members for members in groups if not isinstance(members[0], RoutedSlot)]]
        room = torch.tensor([-int(MOMENT_SHARE * free_bytes(self.anatomy.device))])
        parallel.all_reduce_max(room)
        left = -int(room)
        for members in single:
            size = MOMENT_ITEM * members[0].shape[1] ** 2 if SECOND_MOMENT in self.needs else 0
            if left < size and any(isinstance(one[0], RoutedSlot) for one in parts[-1]):
                parts.append([])
                left = -int(room)
            parts[-1].append(members)
            left -= size
        return [part for part in parts if part]
