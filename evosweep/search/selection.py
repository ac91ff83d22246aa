"""Selection of the next parents from a generation's candidates, stage by stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Candidate, Progress, StageRecord
from evosweep.core.problem import Genome, Problem
from evosweep.search.plan import Plan
from evosweep.search.protocols import Scorer
from evosweep.search.surrogate import Surrogate
from evosweep.search.survival import Outcome


@dataclass(frozen=True)
class Selection:
    """The outcome of a generation's selection.

    Attributes:
        winner: The best; its slot is negative if it is a parent.
        parents: Genomes that the next generation is made of, the winner's first.
        candidates: All candidates with their scores, as they were proposed.
        stages: Spread of the scores of each stage that was scored.
        tokens: Tokens scored, summed over candidates.
        saved: Tokens that scoring every stage to its end would have taken beyond that.
    """

    winner: Candidate
    parents: tuple[Genome, ...]
    candidates: tuple[Candidate, ...]
    stages: tuple[StageRecord, ...] = ()
    tokens: int = 0
    saved: int = 0


@dataclass(frozen=True)
class Selector:
    """Selects the next parents from a generation's candidates.

    Args:
        problem: Units and levels, to name candidates by.
        scorer: Gives losses and fitness.
        plan: Stages, and how each is scored.
        progress: Shows which candidates were no use.
        surrogate: Drops candidates before they are scored; None drops nobody.
        same_tokens: Whether all generations are scored on the same tokens.
        parents: How many of the best become parents.
        order: Returns which of some genomes with these scores are better, best first; None: those with lower scores.
    """

    problem: Problem
    scorer: Scorer
    plan: Plan
    progress: Progress
    surrogate: Surrogate | None
    same_tokens: bool
    parents: int
    order: Callable[[Sequence[Genome], npt.NDArray[np.float64]], Sequence[int]] | None = None

    def run(self, candidates: Sequence[Candidate], parents: Sequence[Genome], generation: int) -> Selection:
        """Return what is left of a generation; a genome that was proposed twice is scored once.

        Args:
            candidates: Proposals, unscored.
            parents: Genomes that they were made of, best first; they compete in the last stage.
            generation: 0, 1, 2 ...
        """
        first: dict[bytes, Candidate] = {}
        for candidate in candidates:
            first.setdefault(candidate.genome.tobytes(), candidate)
        distinct = list(first.values())
        if self.surrogate is None:
            selection = self._select(distinct, parents, generation)
        else:
            kept = self.surrogate.promising([candidate.genome for candidate in distinct])
            selection = self._select([distinct[index] for index in kept], parents, generation)
            self.surrogate.learn_from(selection.candidates)
        return replace(selection, candidates=self._with_duplicates(candidates, selection.candidates, first))

    @staticmethod
    def _with_duplicates(
        candidates: Sequence[Candidate], scored: Sequence[Candidate], first: dict[bytes, Candidate]
    ) -> tuple[Candidate, ...]:
        """Return all candidates with scores; those that screening dropped are left out."""
        by_slot = {candidate.slot: candidate for candidate in scored}
        found = []
        for candidate in candidates:
            original = by_slot.get(first[candidate.genome.tobytes()].slot)
            if original is None:
                continue
            is_copy = original.slot != candidate.slot
            found.append(
                replace(candidate, scores=original.scores, duplicate_of=original.slot) if is_copy else original
            )
        return tuple(found)

    def _select(self, candidates: Sequence[Candidate], parents: Sequence[Genome], generation: int) -> Selection:
        """Run all stages. A tie goes to the better parent, then to the lower slot.

        A single candidate without a rival is not scored.
        """
        if len(candidates) == 1 and not parents:
            return Selection(candidates[0], (candidates[0].genome,), tuple(candidates))
        by_slot = {candidate.slot: candidate for candidate in candidates}
        alive = list(candidates)
        records = []
        tokens = 0
        saved = 0
        last = len(self.plan.stages) - 1
        for index, stage in enumerate(self.plan.stages):
            survivors = max(stage.survivors, self.parents) if index == last else stage.survivors
            if index == last:
                alive = _with_parents(alive, parents)
            elif len(alive) <= survivors:
                continue  # nobody would be left behind
            outcome = self._score(alive, generation, index, survivors)
            tokens += outcome.tokens
            saved += stage.tokens * len(alive) - outcome.tokens
            parent = float(outcome.scores[0]) if index == last and parents else None
            records.append(_spread(outcome.scores, stage.tokens, parent=parent))
            alive = [
                replace(candidate, scores={**candidate.scores, index: float(score)})
                for candidate, score in zip(alive, outcome.scores, strict=True)
            ]
            by_slot.update((candidate.slot, candidate) for candidate in alive if candidate.slot >= 0)
            alive = [alive[rank] for rank in self._order(alive, outcome)[:survivors]]
        best = [candidate for candidate in alive if candidate is alive[0] or np.isfinite(candidate.scores[last])]
        ordered = tuple(by_slot[slot] for slot in sorted(by_slot))
        return Selection(alive[0], tuple(c.genome for c in best), ordered, tuple(records), tokens, saved)

    def _order(self, alive: Sequence[Candidate], outcome: Outcome) -> Sequence[int]:
        """Return candidate indices, best first."""
        if self.order is None:
            return list(outcome.order())
        return self.order([candidate.genome for candidate in alive], outcome.scores)

    def _score(self, alive: Sequence[Candidate], generation: int, index: int, survivors: int) -> Outcome:
        """Return what a stage found, its scores infinite where fitness is NaN."""
        outcome = self.plan.survival.run(
            np.stack([candidate.genome for candidate in alive]),
            scorer=self.scorer,
            generation=0 if self.same_tokens else generation,
            stage=index,
            tokens=self.plan.stages[index].tokens,
            survivors=survivors,
        )
        broken = np.isnan(outcome.scores)
        if broken.all():
            raise EvosweepError(
                f"generation {generation}: the fitness of all {len(alive)} candidates is NaN; "
                "the model overflows in its number type (try another one) or its levels are damaged"
            )
        for candidate in map(int, np.flatnonzero(broken)):
            self._report(alive[candidate], generation)
        return replace(outcome, scores=np.where(broken, np.inf, outcome.scores))

    def _report(self, candidate: Candidate, generation: int) -> None:
        """Show which candidate has no fitness."""
        levels = ", ".join(f"{unit}: {level}" for unit, level in self.problem.decode(candidate.genome).items())
        self.progress.say(f"generation {generation}: a candidate is out, its fitness is NaN: {levels}")


def _with_parents(alive: Sequence[Candidate], parents: Sequence[Genome]) -> list[Candidate]:
    """Return the parents as candidates of slots -1, -2 ..., then the candidates that are no parent's copy."""
    known = {parent.tobytes() for parent in parents}
    rivals = [Candidate(slot=-1 - rank, genome=parent) for rank, parent in enumerate(parents)]
    return [*rivals, *(candidate for candidate in alive if candidate.genome.tobytes() not in known)]


def _spread(scores: npt.NDArray[np.float64], tokens: int, *, parent: float | None) -> StageRecord:
    """Return the record of a stage.

    Args:
        scores: Of its candidates, shape (candidates,).
        tokens: That it scored each of them on.
        parent: Score of the best parent on the same tokens, if it was scored.
    """
    return StageRecord(
        scored=len(scores),
        tokens=tokens,
        best=float(scores.min()),
        median=float(np.median(scores)),
        worst=float(scores.max()),
        parent=parent,
    )
