"""Interfaces that a search needs: a sampler that proposes genomes, a scorer that evaluates them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.events import Candidate
from evosweep.core.problem import Genome, Problem

Genomes = npt.NDArray[np.int64]


class Scorer(Protocol):
    """Computes losses and fitness of genomes; ``search`` decides which survive.

    The tokens of a stage follow from (seed, generation, stage) alone: a stage scored twice gives the same numbers.
    ``losses``, ``reduce`` and ``seq_len`` are needed for racing only, ``score_all`` and ``final_tokens`` only where a
    plan scores its elites once more (``Plan.final``).
    """

    @property
    def seq_len(self) -> int:
        """Tokens a window."""

    def score(self, genomes: Genomes, *, generation: int, stage: int, tokens: int) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes on the tokens of a stage, shape (genomes,); lower is better.

        Args:
            genomes: Level indices, shape (genomes, units).
            generation: 0, 1, 2 ...
            stage: Index of the stage.
            tokens: How many tokens the stage scores a genome on.
        """

    def losses(
        self, genomes: Genomes, *, generation: int, stage: int, tokens: int, windows: slice, length: int
    ) -> npt.NDArray[np.float32]:
        """Return the loss of genomes on each token, shape (genomes, windows, length - 1).

        Args:
            genomes: Level indices, shape (genomes, units).
            generation: 0, 1, 2 ...
            stage: Index of the stage.
            tokens: How many tokens the stage has in all.
            windows: Which of the stage's windows, each of ``seq_len`` tokens.
            length: How many tokens of each window, from its start.
        """

    def reduce(self, loss: float) -> float:
        """Return the fitness that a mean loss per token stands for."""

    def score_all(self, genomes: Genomes, *, limit: int | None) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes on every search token, or on at most ``limit`` of them, shape (genomes,)."""

    def final_tokens(self, limit: int | None) -> int:
        """Return on how many tokens ``score_all`` scores a genome."""

    def validate(self, genome: Genome) -> dict[str, float]:
        """Return ``kl`` (nats per token) and ``ppl`` on the fixed validation set."""


@dataclass(frozen=True)
class Request:
    """Genomes to be scored on some windows; they may be above the budget, since none of them is a proposal.

    Attributes:
        genomes: Level indices, shape (genomes, units).
        windows: Which of the survey's windows.
        length: How many tokens of each window, from its start.
    """

    genomes: Genomes
    windows: slice
    length: int


@dataclass(frozen=True)
class Text:
    """The search text: how many windows it has, and how many tokens each."""

    windows: int
    seq_len: int


class Survey(Protocol):
    """Measurements of one generation, request by request.

    Attributes:
        windows: Different windows that it asks for at most.
    """

    windows: int

    def ask(self) -> Request | None:
        """Return what should be scored next; None at the end."""

    def tell(self, losses: npt.NDArray[np.float32]) -> None:
        """Receive the losses of the last request, shape (genomes, windows, tokens)."""


class Sampler(Protocol):
    """A search algorithm: proposes the candidates of every generation and receives their scores.

    When a search continues, a sampler whose ``state`` is not empty is restored from it. For any other, ``population``
    and ``learn`` are called again for every recorded generation; it is an error where the proposals differ.

    Attributes:
        name: Name of the sampler, as in ``sampler=...``.
        seed: Seed of its random choices.
        problem: Units, levels and budget.
        limit: Generations that it has proposals for; None: no limit.
        same_tokens: Whether all generations are to be scored on the same tokens.
        population_size: How many of the best become parents.
        surveys: Whether it has something measured before it proposes: ``survey`` is called before ``population``.
        ranks: Whether it says itself which candidates are better, by ``order``.
        axis: What it compares beside the loss, where it ranks them itself, as ``SearchResult.axis``.
    """

    name: str
    seed: int
    problem: Problem
    limit: int | None
    same_tokens: bool
    population_size: int
    surveys: bool
    ranks: bool
    axis: str

    def order(self, genomes: Sequence[Genome], losses: npt.NDArray[np.float64]) -> Sequence[int]:
        """Return candidate indices, best first, where it ranks them itself; the best is the generation's elite.

        Args:
            genomes: Shape (units,) each.
            losses: On the same tokens, shape (genomes,).
        """

    def survey(self, *, generation: int, parents: Sequence[Genome], text: Text) -> Survey | None:
        """Return what is to be measured before a generation is proposed; None if nothing is.

        Args:
            generation: 0, 1, 2 ...
            parents: As ``population`` will receive them.
            text: What measurements can be made on.
        """

    def survey_tokens(self, generation: int) -> int:
        """Return about how many tokens a generation's ``survey`` takes, before it is known."""

    def population(self, *, generation: int, parents: Sequence[Genome]) -> list[Candidate]:
        """Return a generation's candidates; an empty list ends the search."""

    def size(self, generation: int) -> int:
        """Return how many candidates a generation has."""

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Receive the scored candidates of the generation proposed last."""

    def facts(self) -> Mapping[str, float]:
        """Return numbers about the sampler itself, recorded with every generation."""

    def state(self) -> Mapping[str, Any]:
        """Return the JSON state that cannot be rebuilt from the recorded generations; empty if there is none."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
