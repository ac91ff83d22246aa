"""EvoPress as an Optuna sampler."""

from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.search.evopress import EvoPress


class EvoPressSampler(PopulationSampler):
    """Evolutionary search with one parent and λ offspring (arXiv 2410.14649).

    Args:
        problem: Units, ladders, budget.
        seed: Same seed, same proposals.
        offspring: λ, proposals a generation.
        max_flips: Most flips a mutation.
        cross: Share of flips that move budget between units of different size; 0 is the paper's search.
        start_candidates: Proposals of generation 0 where the budget is not what one level for all units costs.
    """

    name = "evopress"

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        offspring: int = 64,
        max_flips: int = 3,
        cross: float = 0.5,
        start_candidates: int = 16,
    ) -> None:
        super().__init__(problem, seed=seed)
        self.search = EvoPress(
            problem, seed=seed, offspring=offspring, max_flips=max_flips, cross=cross,
            start_candidates=start_candidates,
        )

    def genomes(self, *, generation: int, elite: Genome | None) -> list[Genome]:
        """Return the start, or the offspring of ``elite``."""
        if generation == 0 or elite is None:
            return self.search.start()
        return self.search.offspring(generation=generation, parent=elite)

    def size(self, generation: int) -> int:
        """Return the trials of a generation."""
        return len(self.search.start()) if generation == 0 else self.search.size
