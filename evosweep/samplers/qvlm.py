"""EvoPress block by block: one group of neighbouring blocks a generation, grouped by the entropy of activations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_int, check_number
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.search.block_groups import ENTROPY, dependent_groups, part


class QVLMSampler(EvoPressSampler):
    """Searches one group of dependent blocks after the other, as Q-VLM does (Wang et al., arXiv 2410.08119).

    In every generation, offspring differ from their parent in one group only, whose share of the budget stays as it is;
    every ``whole``-th generation moves budget between groups, as EvoPress's do. Q-VLM searches the ranges of quantized
    activations instead of levels; ``dependent_groups`` says how its groups differ.

    Args:
        problem: Units with the column ``activation_entropy``, ladders, budget.
        joined: Share of the boundaries between blocks, those of the highest entropy, over which blocks are joined.
        most_blocks: Blocks of a group at most.
        whole: Every how many generations budget moves between groups; 0: never.
        **evolution: ``EvoPressSampler``'s settings: seed, offspring, max_flips, start and all others.

    Raises:
        SettingError: A setting is out of range, or the start does not fit the budget.
    """

    holds_limits = False
    name = "qvlm"

    def __init__(
        self, problem: Problem, *, joined: float = 0.5, most_blocks: int = 3, whole: int = 4, **evolution: Any
    ) -> None:
        super().__init__(problem, **evolution)
        self.columns = (*self.columns, ENTROPY)
        self.joined = check_number("joined", joined, low=0, high=1)
        self.most_blocks = check_int("most_blocks", most_blocks, low=1)
        self.whole = check_int("whole", whole, low=0)
        self._members: list[npt.NDArray[np.int64]] | None = None

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the start, or the parents' offspring within the generation's group of blocks."""
        everywhere = super().genomes(generation=generation, parents=parents)
        if generation == 0 or not parents or (self.whole and generation % self.whole == 0):
            return everywhere
        members = self._group(generation)
        inside = [part(self.problem, members, parent) for parent in parents]
        made = []
        for slot, other in enumerate(everywhere):
            index = self.parent_index(generation=generation, slot=slot, count=len(parents))
            rng = generator(self.seed, "group", generation, slot)
            genome = parents[index].copy()
            genome[members] = self.search.mutation(inside[index], genome[members], rng)
            moved = (genome != parents[index]).any() and self.problem.feasible(genome)
            made.append(genome if moved else other)
        return made

    def _group(self, generation: int) -> npt.NDArray[np.int64]:
        """Return the indices of the units of the group that a generation searches, the groups taking turns."""
        if self._members is None:  # not earlier: the column may not be measured yet
            labels = dependent_groups(self.problem, joined=self.joined, most=self.most_blocks)
            self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        turn = generation - 1 if not self.whole else generation - 1 - generation // self.whole
        return self._members[turn % len(self._members)]
