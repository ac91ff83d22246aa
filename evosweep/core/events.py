"""Events and records of a search, as listeners (trackers, progress, reports) receive them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from evosweep.core.allocation import Allocation
from evosweep.core.metrics import SIZE_MB
from evosweep.core.problem import Genome, Problem

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One scored genome of a generation.

    Attributes:
        slot: Index in the generation; with (seed, generation) it names the randomness that made it.
        genome: Level indices, shape (units,).
        scores: Mean fitness of each stage that it was scored in, by stage index.
        parent: Hash of the allocation that it was mutated from, if any.
        duplicate_of: Slot of an earlier candidate of this generation with the same genome: scored there, not here.
    """

    slot: int
    genome: Genome
    scores: Mapping[int, float] = field(default_factory=dict)
    parent: str | None = None
    duplicate_of: int | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """Spread of one stage's scores.

    Attributes:
        parent: Score of the best parent on the same tokens; None where no parent was scored.
    """

    scored: int
    tokens: int
    best: float
    median: float
    worst: float
    parent: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """The outcome of one generation.

    Attributes:
        validation: Fixed-set figures of the elite: ``kl`` (nats per token) and ``ppl``.
        tokens: Tokens scored by the search so far, candidates times tokens; validation not counted.
        tokens_saved: Tokens of this generation that racing did not score.
        changed: Units in which the elite differs from the elite before it.
        facts: Numbers that the sampler reports about itself.
        parents: Genomes that the next generation is made of, the elite's first.
    """

    generation: int
    elite: Allocation
    elite_slot: int | None
    cost: int
    bits_per_weight: float
    stages: tuple[StageRecord, ...]
    candidates: tuple[Candidate, ...]
    validation: Mapping[str, float]
    tokens: int
    tokens_per_second: float
    changed: int
    seconds: float
    elapsed: float
    tokens_saved: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[Genome, ...] = ()


@dataclass(frozen=True)
class FinalRecord:
    """Scores of all elites of a search on common tokens, at its end.

    Attributes:
        scores: Fitness of every distinct elite, by the generation in which it first was one; lower is better.
        tokens: Tokens that each of them was scored on.
        spent: Tokens scored in all.
    """

    scores: Mapping[int, float]
    tokens: int
    spent: int

    @property
    def winner(self) -> int:
        """The generation whose elite is the best; of equals, the earliest."""
        return min(sorted(self.scores), key=lambda generation: self.scores[generation])


@dataclass(frozen=True)
class SearchStarted:
    """A search begins or continues.

    Attributes:
        name: Of the run.
        problem: What is searched over.
        seed: Of all randomness.
        facts: What else listeners should know.
        continued: Generations that were done before; 0 for a new search.
    """

    name: str
    problem: Problem
    seed: int
    facts: Mapping[str, Any]
    continued: int = 0


@dataclass(frozen=True)
class SearchEnded:
    """A search is over and its winner exported, if asked."""

    result: "SearchResult"


@dataclass(frozen=True)
class SearchResult:
    """A search's outcome: the winner, and how it was found.

    Attributes:
        allocation: The winner.
        validation: The winner's figures on the fixed validation set: ``kl`` and ``ppl``. They select nothing.
        tokens: Tokens scored by the search, the final scoring of all elites included.
        stopped: Why it ended: ``finished``, or the reason of the stopping rule.
        winner_generation: Generation in which the winner first was the elite; -1: the last one.
        domains: Figures on each further text, of the dense model, the uniform allocation and the winner.
        against: Paired tests of the winner against the uniform allocation and its own start, on validation.
        paragraph: ``tokens`` of held-out text, and the KL of ``uniform`` and ``found`` at each of them.
        final: What all elites scored on common tokens; None where they were not scored again.
        controls: Validation figures and bits per weight of ``found``, ``uniform``, and the winner with each kind of
            decision made uniform; empty where nothing was searched.
        axis: What a front minimizes beside the loss: ``size_mb`` or ``milliseconds``.
        candidates_of_front: Genomes from which the front of a search of two objectives is taken; empty for any other.
        front: Points of that front, the largest size first: ``point``, ``allocation``, sizes and figures of each.
    """

    sampler: str
    seed: int
    allocation: Allocation
    problem: Problem
    generations: tuple[GenerationRecord, ...]
    validation: Mapping[str, float]
    dense: Mapping[str, float]
    tokens: int
    seconds: float
    tokens_saved: int = 0
    stopped: str = "finished"
    winner_generation: int = -1
    final: FinalRecord | None = None
    finish: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)
    continuations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tails: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    controls: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    candidates_of_front: tuple[Genome, ...] = ()
    axis: str = SIZE_MB
    front: tuple[Mapping[str, Any], ...] = ()
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    against: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paragraph: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """True bits of the winner."""
        return self.problem.cost(self.problem.encode(self.allocation))

    def row(self) -> dict[str, Any]:
        """Return the figures that a comparison needs, under stable names."""
        return {
            "sampler": self.sampler,
            "seed": self.seed,
            "bits_per_weight": self.problem.bits_per_weight(self.cost),
            "size_mb": self.problem.megabytes(self.cost),
            "sparsity": self.problem.sparsity(self.problem.encode(self.allocation)),
            **self.problem.limit_figures(self.problem.encode(self.allocation)),
            "kl": self.validation["kl"],
            "ppl": self.validation["ppl"],
            "dense_ppl": self.dense["ppl"],
            "tokens": self.tokens,
            "tokens_saved": self.tokens_saved,
            "seconds": self.seconds,
        }

    def history(self) -> list[dict[str, float]]:
        """Return what was found after every generation: tokens and seconds spent, true size, validation figures."""
        return [
            {
                "generation": record.generation,
                "tokens": record.tokens,
                "seconds": record.elapsed,
                "bits_per_weight": record.bits_per_weight,
                "kl": record.validation["kl"],
                "ppl": record.validation["ppl"],
            }
            for record in self.generations
        ]


Event = SearchStarted | GenerationRecord | SearchEnded


class Listener(Protocol):
    """Receives the events of a search."""

    def on_event(self, event: Event) -> None:
        """Handle ``event``; may write, must not change it."""


class Progress(Protocol):
    """Shows how far a phase is."""

    def track(self, items: Sequence[T], *, description: str, tokens: int | None = None) -> Iterable[T]:
        """Yield ``items`` while showing progress and time left.

        Args:
            items: What is worked on, one after the other.
            description: Of the phase.
            tokens: Tokens that end the phase, if those do and not the items; ``note`` says how many are spent.
        """

    def say(self, text: str) -> None:
        """Show one line."""

    def note(self, values: Mapping[str, str], *, tokens: int | None = None) -> None:
        """Show figures of the item of ``track`` that is done, and count the tokens spent so far."""


class Silent:
    """Progress that shows nothing."""

    def track(self, items: Sequence[T], *, description: str, tokens: int | None = None) -> Iterable[T]:
        """Return ``items``.

        Args:
            items: What is worked on.
            description: Not shown.
            tokens: Not shown.
        """
        del description, tokens
        return items

    def say(self, text: str) -> None:
        """Drop ``text``."""

    def note(self, values: Mapping[str, str], *, tokens: int | None = None) -> None:
        """Drop ``values``."""
