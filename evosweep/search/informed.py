"""EvoPress's offspring, drawn by what is known of single moves instead of by lot."""

from collections.abc import Sequence

from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.combination import combined, drawn_effects
from evosweep.search.evolution import EvoPress
from evosweep.search.move_survey import Surveyor

BLIND = 4  # every fourth offspring is EvoPress's own, so that no move is ruled out


class InformedProposals:
    """Makes offspring that are the best few moves under effects drawn as they are believed.

    The number of moves is that of EvoPress's flips, two moves a flip. So a move is proposed as often as it is believed
    to be among the best ones (Thompson sampling).

    Args:
        problem: Units, ladders, budget.
        seed: Seeds all randomness, together with what it is used for.
        search: The evolution whose offspring these are.
        max_flips: Largest number of flips; min(U{1..max_flips}, U{1..max_flips}) are drawn.
    """

    def __init__(self, problem: Problem, *, seed: int, search: EvoPress, max_flips: int) -> None:
        self.problem = problem
        self.seed = seed
        self.search = search
        self.max_flips = max_flips
        self.surveyor = Surveyor(problem)

    def offspring(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the offspring of a generation, all within the budget.

        Args:
            generation: 1, 2 ...
            parents: Best first; informed offspring are those of the best.
        """
        slots = [slot for slot in range(self.search.size) if is_informed(slot)]
        informed = dict(zip(slots, self._drawn(generation, parents[0], len(slots)), strict=False))
        genomes = []
        for slot in range(self.search.size):
            genome = informed.get(slot)
            if genome is None or (genome == parents[0]).all():
                genome = self.search.child(generation=generation, slot=slot, parents=parents)
            genomes.append(genome)
        return genomes

    def _drawn(self, generation: int, parent: Genome, count: int) -> list[Genome]:
        """Return informed offspring, fewer than ``count`` only where no move exists.

        Args:
            generation: 1, 2 ...
            parent: Shape (units,).
            count: How many.
        """
        table, estimates = self.surveyor.estimates(parent)
        if not len(table):
            return []
        rng = generator(self.seed, "flips", generation)
        flips = rng.integers(1, self.max_flips + 1, size=(count, 2)).min(axis=1)
        effects = drawn_effects(estimates, self.seed, generation, rows=count)
        changes = (2 * flips).tolist()
        return combined(self.problem, table, effects, changes=changes, seed=self.seed, generation=generation)


def is_informed(slot: int) -> bool:
    """Return whether a slot's offspring is drawn by what is known, and so of the best parent."""
    return slot % BLIND != BLIND - 1
