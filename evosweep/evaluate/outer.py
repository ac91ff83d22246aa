"""The units outside of the blocks, embedding and head, as indices into a genome, and a population grouped by them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome
from evosweep.core.unit import Unit
from evosweep.evaluate.routing import distinct_rows, levels_in
from evosweep.models.anatomy import Anatomy

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeadGroup:
    """The candidates of a population that have one level of the head.

    Attributes:
        level: The level; None is the dense head.
        states: Index of each distinct row of final hidden states among them; None: all, as they are.
        members: Indices of the candidates.
        rows: Which of ``states`` each of these candidates has.
    """

    level: int | None
    states: Indices | None
    members: Indices
    rows: Indices


@dataclass(frozen=True)
class OuterUnits:
    """Indices of the units outside of the blocks; one unit is both where one tensor is.

    Attributes:
        embedding: Of the unit whose level is looked up; None where the embedding is no unit.
        head: Of the unit whose level is the output matrix; None where the head is no unit.
    """

    embedding: int | None
    head: int | None

    @classmethod
    def of(cls, anatomy: Anatomy, units: Sequence[Unit]) -> "OuterUnits":
        """Return which of a store's units they are."""
        indices = {unit.name: index for index, unit in enumerate(units) if unit.outer}
        slots = anatomy.outer if indices else {}
        found = {role: indices[slot.name] for role, slot in slots.items() if slot.name in indices}
        embedding = found.get("embedding")
        tied = embedding is not None and slots["embedding"].tied
        return cls(embedding, embedding if tied else found.get("head"))

    def head_level(self, genome: Genome) -> int | None:
        """Return a genome's level of the head; None is the dense head."""
        return None if self.head is None else int(genome[self.head])

    def head_levels(self, genomes: npt.NDArray[np.int64]) -> list[int | None]:
        """Return the levels of the head that occur in genomes (genomes, units); one None for the dense head."""
        return [None] if self.head is None else list(levels_in(genomes[:, self.head])[0])

    def without_head(self, genomes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the levels (genomes, units) of all units that change final hidden states."""
        if self.head is None or self.head == self.embedding:
            return genomes
        return np.delete(genomes, self.head, axis=1)

    def by_head(self, genomes: npt.NDArray[np.int64], rows: Indices) -> list[HeadGroup]:
        """Return a population grouped by the head's level.

        Args:
            genomes: Level indices (genomes, units).
            rows: Row of final hidden states that each genome has.
        """
        if self.head is None:
            return [HeadGroup(None, None, np.arange(len(genomes)), rows)]
        groups = []
        for level in levels_in(genomes[:, self.head])[0]:
            members = np.flatnonzero(genomes[:, self.head] == level)
            first, which = distinct_rows(rows[members, None])
            groups.append(HeadGroup(level, rows[members][first], members, which))
        return groups
