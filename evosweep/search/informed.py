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
        genomes = self.search.offspring(generation=generation, parents=parents)
        slots = [slot for slot in range(len(genomes)) if is_informed(slot)]
        rng = generator(self.seed, "flips", generation)
        flips = rng.integers(1, self.max_flips + 1, size=(len(slots), 2)).min(axis=1)
        table, estimates = self.surveyor.estimates(parents[0])
        if not len(table):
            return genomes
        effects = drawn_effects(estimates, self.seed, generation, rows=len(slots))
        changes = (2 * flips).tolist()
        made = combined(self.problem, table, effects, changes=changes, seed=self.seed, generation=generation)
        for slot, genome in zip(slots, made, strict=True):
            if (genome != parents[0]).any():
                genomes[slot] = genome
        return genomes


def is_informed(slot: int) -> bool:
    """Return whether a slot's offspring is drawn by what is known, and so of the best parent."""
    return slot % BLIND != BLIND - 1
