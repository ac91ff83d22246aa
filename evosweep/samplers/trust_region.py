"""The search that combines measured moves within trust regions, as an Optuna sampler."""

from collections.abc import Mapping, Sequence
from typing import Any

from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem
from evosweep.samplers.evopress import EvoPressSampler, Start, check_kind
from evosweep.search.combination import TrustRegion
from evosweep.search.protocols import Survey, Text

KIND = "trust_region"
CHANGES = (6, 16, 40, 100, None)


class TrustRegionSampler(EvoPressSampler):
    """Measures every single move around the incumbent, and proposes the best combinations of few and of many.

    In a ``study.optimize`` of your own nothing can be measured beside the trials: it proposes EvoPress's offspring.

    Args:
        problem: Units, ladders, budget.
        seed: Same seed, same proposals.
        changes: Most changes of each proposal, for one trust region each; null is any number. They halve with every
            generation that did not move the incumbent.
        probe_tokens: Tokens that a single move is measured on, on average; moves whose decision is open get more.
        offspring: Proposals a generation: one for each trust region, the others from drawn effects.
        start: Where to start instead of uniform, as ``EvoPressSampler``'s.

    Raises:
        SettingError: A setting is out of range, or the start does not fit the budget.
    """

    name = KIND
    surveys = True

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        changes: Sequence[int | None] = CHANGES,
        probe_tokens: int = 1024,
        offspring: int = 32,
        start: Start | Sequence[Start] | None = None,
    ) -> None:
        super().__init__(
            problem, seed=seed, offspring=offspring, start=start, probe_tokens=probe_tokens, survey_every=1
        )
        if isinstance(changes, str) or not isinstance(changes, Sequence) or not changes:
            raise SettingError("changes", allowed="a list of numbers of changes, as [6, 16, null]", got=changes)
        for index, limit in enumerate(changes):
            if limit is not None:
                check_int(f"changes[{index}]", limit, low=1)
        self.trust_region = TrustRegion(problem, seed=seed, changes=changes, offspring=offspring)
        self._surveyed: int | None = None

    def survey(self, *, generation: int, parents: Sequence[Genome], text: Text) -> Survey | None:
        """Return the measurements around the incumbent; none in generation 0.

        Args:
            generation: 0, 1, 2 ...
            parents: The incumbent, if there is one.
            text: What measurements can be made on.
        """
        if generation == 0 or not parents:
            return None
        self._surveyed = generation
        return self.trust_region.survey(parents[0], tokens=self.probe_tokens, text=text)

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the start, the combinations of what was surveyed, or EvoPress's offspring where nothing was."""
        if self._surveyed is None or self._surveyed != generation:
            return super().genomes(generation=generation, parents=parents)
        self._surveyed = None
        return self.trust_region.propose(generation=generation, base=parents[0])

    def parent_index(self, *, generation: int, slot: int, count: int) -> int:
        """Return 0: there is one parent.

        Args:
            generation: Not read.
            slot: Not read.
            count: Not read.
        """
        del generation, slot, count
        return 0

    def state(self) -> dict[str, Any]:
        """Return what it knows of single moves, as JSON."""
        return {
            "kind": self.name,
            "failures": self.trust_region.failures,
            **self.trust_region.surveyor.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned.

        Raises:
            EvosweepError: The state is that of another sampler.
        """
        check_kind(state, self.name)
        self.trust_region.failures = int(state.get("failures", 0))
        self.trust_region.surveyor.restore(state)
