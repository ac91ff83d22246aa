"""EvoPress (Sieberling et al., arXiv 2410.14649): λ offspring of one parent or of several, the best of all survive.

Pure: who scores offspring, and on how many tokens, is the caller's matter. Each offspring follows from
(seed, generation, slot) and the parents alone.
"""

from collections.abc import Sequence

from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.moves import fill, random_feasible
from evosweep.search.mutation import Flips, Mutation


class EvoPress:
    """The evolutionary search: ``start()`` returns generation 0, ``offspring()`` every later one.

    Args:
        problem: Units, ladders, budget.
        seed: Seeds all randomness, together with what it is used for (generation, slot).
        offspring: λ, genomes a generation.
        mutation: Makes an offspring of a parent; EvoPress's own with its default settings if None.
        start_candidates: Genomes of generation 0 where the budget is not what one level for all units costs.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int,
        offspring: int,
        mutation: Mutation | None = None,
        start_candidates: int = 16,
    ) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self.size = check_int("offspring", offspring, low=1)
        if mutation is not None and not callable(mutation):
            raise SettingError("mutation", allowed="a mutation (an object with _target_) or null", got=mutation)
        self.mutation = Flips() if mutation is None else mutation
        self.start_candidates = check_int("start_candidates", start_candidates, low=1)

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

    def parent_index(self, *, generation: int, slot: int, count: int) -> int:
        """Return the index of the parent of a slot's offspring, drawn by lot.

        Args:
            generation: 1, 2, ...
            slot: Index of the offspring in its generation.
            count: Number of parents.
        """
        return 0 if count == 1 else int(generator(self.seed, "parent", generation, slot).integers(count))

    def offspring(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the λ offspring of a generation (1, 2, ...), all within the budget."""
        return [self.child(generation=generation, slot=slot, parents=parents) for slot in range(self.size)]

    def child(self, *, generation: int, slot: int, parents: Sequence[Genome]) -> Genome:
        """Return the offspring of one slot.

        Args:
            generation: 1, 2, ...
            slot: Index of the offspring in its generation.
            parents: Best first.
        """
        parent = parents[self.parent_index(generation=generation, slot=slot, count=len(parents))]
        return self.mutation(self.problem, parent, generator(self.seed, "offspring", generation, slot))


class RandomSearch:
    """Random genomes within the budget, drawn anew for every generation.

    Args:
        problem: Units, ladders, budget.
        seed: Seeds all randomness, together with what it is used for (generation, slot).
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
