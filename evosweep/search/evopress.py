"""EvoPress (Sieberling et al., arXiv 2410.14649): λ offspring of one parent or of several, the best of all go on.

Pure: who scores offspring, and on how many tokens, is the caller's matter. Each offspring follows from
(seed, generation, slot) and the parents alone.
"""

from collections.abc import Sequence

from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.moves import FLIPS, GROUPS, fill, mutate, random_feasible


class EvoPress:
    """The evolutionary search as ask/tell: ``start()`` gives generation 0, ``offspring()`` every other.

    Args:
        problem: Units, ladders, budget.
        seed: Names all randomness together with the place where it is used.
        offspring: λ, genomes a generation.
        max_flips: Most flips a mutation.
        cross: Share of flips that move budget between units of different size.
        start_candidates: Genomes of generation 0 where the budget is not what one level for all units costs.
        flips: Distribution of the number of flips, as in ``moves.mutate``.
        group: What swaps are between, as in ``moves.mutate``.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int,
        offspring: int,
        max_flips: int = 3,
        cross: float = 0.5,
        start_candidates: int = 16,
        flips: str = FLIPS[0],
        group: str = GROUPS[0],
    ) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self.size = check_int("offspring", offspring, low=1)
        self.max_flips = check_int("max_flips", max_flips, low=1)
        self.cross = check_number("cross", cross, low=0, high=1)
        self.start_candidates = check_int("start_candidates", start_candidates, low=1)
        self.flips = check_choice("flips", flips, FLIPS)
        self.group = check_choice("group", group, GROUPS)

    def start(self) -> list[Genome]:
        """Return generation 0: the uniform genome if it spends the budget, else several fillings of it."""
        uniform = self.problem.uniform()
        starts: list[Genome] = []
        for slot in range(self.start_candidates):
            genome = uniform.copy()
            fill(self.problem, genome, generator(self.seed, "start", slot))
            if (genome == uniform).all():
                return [uniform]
            starts.append(genome)
        return starts

    def parent_place(self, *, generation: int, slot: int, count: int) -> int:
        """Return which of ``count`` parents a slot's offspring is of: one by lot."""
        return 0 if count == 1 else int(generator(self.seed, "parent", generation, slot).integers(count))

    def offspring(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the λ offspring of a generation (1, 2, ...), each within the budget."""
        return [
            mutate(
                self.problem,
                parents[self.parent_place(generation=generation, slot=slot, count=len(parents))],
                generator(self.seed, "offspring", generation, slot),
                max_flips=self.max_flips,
                cross=self.cross,
                flips=self.flips,
                group=self.group,
            )
            for slot in range(self.size)
        ]


class RandomSearch:
    """Random genomes within the budget, every generation anew.

    Args:
        problem: Units, ladders, budget.
        seed: Names all randomness together with the place where it is used.
        offspring: Genomes a generation.
    """

    def __init__(self, problem: Problem, *, seed: int, offspring: int) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self.size = check_int("offspring", offspring, low=1)

    def draw(self, *, generation: int) -> list[Genome]:
        """Return the genomes of a generation."""
        return [
            random_feasible(self.problem, generator(self.seed, "random", generation, slot)) for slot in range(self.size)
        ]
