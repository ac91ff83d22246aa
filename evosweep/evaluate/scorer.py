"""Scores genomes: loss and fitness on the search split, KL and perplexity on the validation split."""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity

CHUNK = 65_536  # tokens of a genome whose losses are held at once where a whole split is scored


class StagedScorer:
    """Scores genomes on search tokens that follow from (seed, generation, stage).

    Args:
        evaluator: Runs populations.
        fitness: What the search minimizes.
        seed: With generation and stage, decides which tokens are drawn.
    """

    def __init__(self, evaluator: Evaluator, *, fitness: Fitness, seed: int) -> None:
        self.evaluator = evaluator
        self.fitness = fitness
        self.seed = seed

    @property
    def seq_len(self) -> int:
        """Tokens a window of the search split."""
        return self.evaluator.splits["search"].seq_len

    def score(
        self, genomes: npt.NDArray[np.int64], *, generation: int, stage: int, tokens: int
    ) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes on the tokens of a stage, shape (genomes,); lower is better.

        Args:
            genomes: Level indices, shape (genomes, units).
            generation: 0, 1, 2 ...
            stage: Index of the stage.
            tokens: How many tokens the stage scores a genome on; a multiple of ``seq_len``.
        """
        windows = self._windows(generation, stage, tokens)
        return self.evaluator.score(genomes, split="search", windows=windows, fitness=[self.fitness])[self.fitness.name]

    def losses(
        self,
        genomes: npt.NDArray[np.int64],
        *,
        generation: int,
        stage: int,
        tokens: int,
        windows: slice,
        length: int,
    ) -> npt.NDArray[np.float32]:
        """Return the loss of genomes on each token of some windows of a stage, shape (genomes, windows, length - 1).

        Args:
            genomes: Level indices, shape (genomes, units).
            generation: 0, 1, 2 ...
            stage: Index of the stage.
            tokens: How many tokens the stage has in all; a multiple of ``seq_len``.
            windows: Which of the stage's windows.
            length: How many tokens of each window, from its start.
        """
        chosen = self._windows(generation, stage, tokens)[windows]
        return self.evaluator.token_losses(
            genomes, split="search", windows=chosen, fitness=[self.fitness], length=length
        )[self.fitness.name]

    def reduce(self, loss: float) -> float:
        """Return the fitness of a mean loss per token: the loss itself, or the perplexity."""
        return self.fitness.reduce(loss)

    def score_all(self, genomes: npt.NDArray[np.int64], *, limit: int | None = None) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes on every search token, shape (genomes,); lower is better.

        Args:
            genomes: Level indices, shape (genomes, units).
            limit: Most tokens for each genome, at least one window; None: no limit.
        """
        windows = self._final_windows(limit)
        at_once = max(1, CHUNK // self.seq_len)
        total = np.zeros(len(genomes))
        for start in range(0, len(windows), at_once):
            losses = self.evaluator.token_losses(
                genomes, split="search", windows=windows[start : start + at_once], fitness=[self.fitness]
            )[self.fitness.name]
            total += losses.sum(axis=(1, 2), dtype=np.float64)
        count = len(windows) * (self.seq_len - 1)
        return np.array([self.fitness.reduce(float(mean)) for mean in total / count])

    def final_tokens(self, limit: int | None = None) -> int:
        """Return on how many tokens ``score_all`` scores a genome: whole windows within ``limit``, at least one."""
        return len(self._final_windows(limit)) * self.seq_len

    def validate(self, genome: Genome | None) -> dict[str, float]:
        """Return ``kl`` (nats per token) and ``ppl`` on the whole validation split; None is the dense model."""
        key = None if genome is None else genome.tobytes()
        if key not in self.evaluator.validated:  # several searches of one evaluator start from the same allocation
            windows = range(len(self.evaluator.splits["validation"].windows))
            measures: list[Fitness] = [KL(), Perplexity()]
            losses = self.evaluator.token_losses(
                None if genome is None else genome[None], split="validation", windows=windows, fitness=measures
            )
            self.evaluator.validated[key] = {
                measure.name: measure.reduce(float(losses[measure.name].mean(dtype=np.float64))) for measure in measures
            }
            self.evaluator.validated_windows[key] = losses["kl"][0].mean(axis=1, dtype=np.float64).tolist()
        return dict(self.evaluator.validated[key])

    def kl_by_window(self, genome: Genome | None) -> list[float]:
        """Return the mean KL of every window of the validation split, in order; arguments as for ``validate``."""
        self.validate(genome)
        return list(self.evaluator.validated_windows[None if genome is None else genome.tobytes()])

    def _windows(self, generation: int, stage: int, tokens: int) -> list[int]:
        """Return the indices of a stage's windows in the search split."""
        count = self.evaluator.splits["search"].count(f"search.stages[{stage}].tokens", tokens)
        return self._draw(count, "tokens", generation, stage)

    def _final_windows(self, limit: int | None) -> list[int]:
        """Return the indices of the windows that the final scoring takes: evenly spaced, the same for every seed.

        So the winners of all searches of a multirun can be compared by them.
        """
        available = len(self.evaluator.splits["search"].windows)
        count = available if limit is None else min(available, max(1, limit // self.seq_len))
        return [index * available // count for index in range(count)]

    def _draw(self, count: int, *key: int | str) -> list[int]:
        """Return ``count`` different windows, drawn by the seed and a key."""
        available = len(self.evaluator.splits["search"].windows)
        draws = generator(self.seed, *key)
        return [int(window) for window in draws.choice(available, size=count, replace=False)]
