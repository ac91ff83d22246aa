"""EvoPress (Sieberling et al., arXiv 2410.14649) as an Optuna sampler."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evosweep.allocators.base import Allocator, allocate, allocator_name, check_limits, is_allocator
from evosweep.core.allocation_text import load_genome
from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.problem import Genome, Problem
from evosweep.samplers.base import PopulationSampler
from evosweep.search.evolution import EvoPress
from evosweep.search.informed import InformedProposals, is_informed
from evosweep.search.mutation import Flips, Mutation
from evosweep.search.protocols import Survey, Text

PROPOSALS = ("random", "informed")

Start = str | Path | Allocator


class EvoPressSampler(PopulationSampler):
    """Evolutionary search with λ offspring, of one parent as in the paper (arXiv 2410.14649) or of several.

    Args:
        problem: Units, ladders, budget.
        seed: Same seed, same proposals.
        offspring: λ, proposals a generation.
        max_flips: Largest number of flips a mutation.
        cross: Share of flips that move budget between units of different size; 0 is the paper's search.
        start_candidates: Proposals of generation 0 where the budget is not what one level for all units costs.
        flips: Distribution of the number of flips: ``min_of_two`` draws (the paper's) or ``uniform``.
        group: Which units may swap: those of the same ``size``, only those that also have the same ``name`` in their
            blocks (``name``), only those in neighbouring blocks that depend on one another (``entropy``, as Q-VLM's
            blocks), or ``none``: no swaps, exchanges only.
        population_size: μ, parents: the best so far, each offspring of one of them by lot. All compete in the last
            stage, on the same tokens.
        start: Where to start instead of uniform (a warm start): an allocation file (``allocation.json``, or a text
            file as ``core/allocation_text.py`` reads it), an allocator, or a list of such, which are the candidates of
            generation 0.
        mutation: Makes an offspring of its parent; replaces the one that ``max_flips``, ``cross``, ``flips`` and
            ``group`` describe.
        proposals: ``random`` (the paper's) draws flips by lot; ``informed`` measures every single move around the
            parent first, and draws flips by what is believed of them, three of four offspring. In a ``study.optimize``
            of your own nothing can be measured beside the trials, and all is drawn by lot.
        probe_tokens: Tokens that a single move is measured on, on average, for informed proposals.
        survey_every: Generations between two such measurements.

    Raises:
        SettingError: A setting is out of range, or the start does not fit the budget.
        EvosweepError: The file holds no allocation of this problem; the message names file, line and unit.
    """

    name = "evopress"
    takes_starts = True
    holds_limits = True

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
        population_size: int = 1,
        start: Start | Sequence[Start] | None = None,
        mutation: Mutation | None = None,
        proposals: str = "random",
        probe_tokens: int = 1024,
        survey_every: int = 25,
    ) -> None:
        super().__init__(problem, seed=seed)
        self.population_size = check_int("population_size", population_size, low=1)
        given = _listed(start)
        if start is not None and not given:
            raise SettingError("start", allowed="null, an allocation.json, an allocator or a list of such", got=start)
        self._starts: list[Genome | Allocator] = [self._checked(one) for one in given]
        allocators = [one for one in self._starts if not isinstance(one, np.ndarray)]
        if self._starts:
            one = allocator_name(allocators[0]) if allocators else ""
            self.name = f"{self.name}+best" if len(self._starts) > 1 else f"{self.name}+{one}".rstrip("+")
        self._first: list[Genome] | None = None
        own = Flips(max_flips=max_flips, cross=cross, flips=flips, group=group)
        used = own if mutation is None else mutation
        needed = [*(name for one in allocators for name in one.columns), *getattr(used, "columns", ())]
        self.columns = tuple(dict.fromkeys(needed))
        self.search = EvoPress(
            problem,
            seed=seed,
            offspring=offspring,
            mutation=used,
            start_candidates=start_candidates,
        )
        self.probe_tokens = check_int("probe_tokens", probe_tokens, low=1)
        self.survey_every = check_int("survey_every", survey_every, low=1)
        self.informed: InformedProposals | None = None
        if check_choice("proposals", proposals, PROPOSALS) == "informed":
            if problem.limits:
                raise SettingError("proposals", allowed="random with a second budget", got=proposals)
            self.informed = InformedProposals(problem, seed=seed, search=self.search, max_flips=max_flips)
            self.surveys = True

    def survey(self, *, generation: int, parents: Sequence[Genome], text: Text) -> Survey | None:
        """Return the measurements around the parent, every ``survey_every`` generations, for informed proposals.

        Args:
            generation: 0, 1, 2 ...
            parents: The parents, best first.
            text: What measurements can be made on.
        """
        if self.informed is None or not parents or not self._surveys_in(generation):
            return None
        return self.informed.surveyor.survey(parents[0], tokens=self.probe_tokens, text=text)

    def survey_tokens(self, generation: int) -> int:
        """Return about how many tokens the measurements of a generation take."""
        moves = 2 * len(self.problem.units)
        return moves * self.probe_tokens if self.surveys and self._surveys_in(generation) else 0

    def _surveys_in(self, generation: int) -> bool:
        """Return whether moves are measured before a generation: before the first, then every ``survey_every``."""
        return generation > 0 and (generation - 1) % self.survey_every == 0

    def state(self) -> dict[str, Any]:
        """Return what is known of single moves, as JSON; empty where nothing is measured."""
        return {} if self.informed is None else {"kind": self.name, **self.informed.surveyor.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned.

        Raises:
            EvosweepError: The state is that of another sampler.
        """
        if self.informed is None:
            super().restore(state)
            return
        check_kind(state, self.name)
        self.informed.surveyor.restore(state)

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the start, or the offspring of ``parents``."""
        if generation == 0 or not parents:
            return self._start()
        if self.informed is not None and self._knows():
            return self.informed.offspring(generation=generation, parents=parents)
        return self.search.offspring(generation=generation, parents=parents)

    def parent_index(self, *, generation: int, slot: int, count: int) -> int:
        """Return the index, among ``count`` parents, of the parent of a slot's offspring.

        Args:
            generation: 1, 2 ...
            slot: Index of the offspring in its generation.
            count: Number of parents.
        """
        if self._knows() and is_informed(slot):
            return 0
        return self.search.parent_index(generation=generation, slot=slot, count=count)

    def size(self, generation: int) -> int:
        """Return the number of trials of a generation."""
        return len(self._start()) if generation == 0 else self.search.size

    def _knows(self) -> bool:
        """Return whether single moves were measured, so that offspring are informed."""
        return self.informed is not None and self.informed.surveyor.base is not None

    def _checked(self, start: Any) -> Genome | Allocator:
        """Return the genome of a file, or an allocator that can work on this problem."""
        if isinstance(start, str | Path):
            return _read(self.problem, Path(start))
        if not is_allocator(start):
            raise SettingError("start", allowed="null, an allocation.json, an allocator or a list of such", got=start)
        check_limits(self.problem, start)
        start.check(self.problem)
        return start

    def _start(self) -> list[Genome]:
        if not self._starts:
            return self.search.start()
        if self._first is None:  # not earlier: columns of allocators may not be measured yet
            found = [one if isinstance(one, np.ndarray) else allocate(one, self.problem) for one in self._starts]
            self._first = list({genome.tobytes(): genome for genome in found}.values())
        return [genome.copy() for genome in self._first]


def _listed(start: Start | Sequence[Start] | None) -> list[Start]:
    """Return starts that are given as none, one or several."""
    if start is None:
        return []
    if isinstance(start, Sequence) and not isinstance(start, str):
        return list(start)
    return [start]


def _read(problem: Problem, path: Path) -> Genome:
    """Return the genome of an allocation file.

    Raises:
        SettingError: It does not fit the budget.
        EvosweepError: It cannot be read or is no allocation of this problem.
    """
    genome = load_genome(path, problem)
    if not problem.feasible(genome):
        raise SettingError(
            "start",
            allowed=f"an allocation of at most {problem.budget} bits",
            got=f"{path} with {problem.cost(genome)} bits",
        )
    return genome


def check_kind(state: Mapping[str, Any], name: str) -> None:
    """Raise EvosweepError where a sampler's state is that of another sampler."""
    if state.get("kind") != name:
        raise EvosweepError(f"the saved search was made by sampler {state.get('kind')!r}, this one is {name}")
