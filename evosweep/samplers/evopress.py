"""EvoPress as an Optuna sampler."""

from pathlib import Path

from evosweep.allocators.base import Allocator, allocate
from evosweep.core.errors import SettingError
from evosweep.core.problem import Allocation, Genome, Problem
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
        flips: Distribution of the number of flips: ``min_of_two`` draws (the paper's) or ``uniform``.
        group: What swaps are between: units of the same ``size``, also of the same ``name`` in their blocks, or
            ``none``: no swaps, exchanges only.
        start: Where to start instead: an ``allocation.json``, or an allocator (a warm start).

    Raises:
        SettingError: The start does not fit the budget.
        EvosweepError: It is no allocation of this problem; says which units are not.
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
        flips: str = "min_of_two",
        group: str = "size",
        start: str | Path | Allocator | None = None,
    ) -> None:
        super().__init__(problem, seed=seed)
        self._allocator, self._first = None, None
        if isinstance(start, str | Path):
            self._first = _read(problem, Path(start))
        elif start is not None:
            if not hasattr(start, "allocate"):
                raise SettingError("sampler.start", allowed="null, an allocation.json or an allocator", got=start)
            start.check(problem)
            self._allocator, self.columns = start, tuple(start.columns)
            self.name = f"{self.name}+{getattr(start, 'name', type(start).__name__.lower())}"
        self.search = EvoPress(
            problem, seed=seed, offspring=offspring, max_flips=max_flips, cross=cross,
            start_candidates=start_candidates, flips=flips, group=group,
        )

    def genomes(self, *, generation: int, elite: Genome | None) -> list[Genome]:
        """Return the start, or the offspring of ``elite``."""
        if generation == 0 or elite is None:
            return self._start()
        return self.search.offspring(generation=generation, parent=elite)

    def size(self, generation: int) -> int:
        """Return the trials of a generation."""
        return len(self._start()) if generation == 0 else self.search.size

    def _start(self) -> list[Genome]:
        if self._first is None and self._allocator is not None:  # only now: its columns may have been measured since
            self._first = allocate(self._allocator, self.problem)
        return self.search.start() if self._first is None else [self._first.copy()]


def _read(problem: Problem, path: Path) -> Genome:
    genome = problem.encode(Allocation.load(path))
    if not problem.feasible(genome):
        raise SettingError(
            "sampler.start", allowed=f"an allocation of at most {problem.budget} bits",
            got=f"{path} with {problem.cost(genome)} bits",
        )
    return genome
