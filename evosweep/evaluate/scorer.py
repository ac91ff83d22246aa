"""Fitness of candidates on tokens drawn by place, and of a winner on the fixed validation set."""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.search.racing import Raced, Racing


class StagedScorer:
    """Scores generations on the search split.

    Args:
        evaluator: Runs populations.
        fitness: What the search minimizes.
        seed: With generation and stage, decides which tokens are drawn.
    """

    def __init__(self, evaluator: Evaluator, *, fitness: Fitness, seed: int) -> None:
        self.evaluator, self.fitness, self.seed = evaluator, fitness, seed

    def score(
        self, genomes: npt.NDArray[np.int64], *, generation: int, stage: int, tokens: int
    ) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes (rows) on the tokens of (seed, generation, stage)."""
        windows = self._windows(generation, stage, tokens)
        return self.evaluator.score(genomes, split="search", windows=windows, fitness=[self.fitness])[self.fitness.name]

    def race(
        self,
        genomes: npt.NDArray[np.int64],
        *,
        generation: int,
        stage: int,
        tokens: int,
        survivors: int,
        racing: Racing,
    ) -> Raced:
        """Return the same, without those whom ``racing`` gives up before all tokens are scored."""
        windows, name = self._windows(generation, stage, tokens), self.fitness.name
        seq_len = self.evaluator.splits["search"].seq_len
        scores, alive, spent = np.full(len(genomes), np.nan), np.arange(len(genomes)), 0
        losses = np.empty((len(genomes), 0, seq_len - 1), dtype=np.float32)
        looks = racing.looks(len(windows), seq_len)
        boundary = racing.boundary(looks)
        for look in looks:
            more = windows[losses.shape[1] : look.windows]
            found = self.evaluator.token_losses(
                genomes[alive], split="search", windows=more, fitness=[self.fitness], length=look.length
            )[name]
            spent += len(alive) * len(more) * look.length
            whole = look.length == seq_len
            if whole:
                losses = np.concatenate([losses, found], axis=1)
            known = losses if whole else found
            scores[alive] = [self.fitness.reduce(mean) for mean in known.mean(axis=(1, 2), dtype=np.float64)]
            stays = ~racing.excluded(known, survivors, boundary=boundary)
            alive, losses = alive[stays], losses[stays]
            if len(alive) <= survivors:
                break
        return Raced(scores, ~np.isin(np.arange(len(genomes)), alive), spent)

    def _windows(self, generation: int, stage: int, tokens: int) -> list[int]:
        split = self.evaluator.splits["search"]
        count = split.count(f"search.stages[{stage}].tokens", tokens)
        draws = generator(self.seed, "tokens", generation, stage)
        return [int(window) for window in draws.choice(len(split.windows), size=count, replace=False)]

    def validate(self, genome: Genome | None) -> dict[str, float]:
        """Return ``kl`` (nats per token) and ``ppl`` on the whole validation split; None is the dense model."""
        key = None if genome is None else genome.tobytes()
        if key not in self.evaluator.validated:  # several searches of one evaluator start from the same allocation
            windows = range(len(self.evaluator.splits["validation"].windows))
            scores = self.evaluator.score(
                None if genome is None else genome[None],
                split="validation",
                windows=windows,
                fitness=[KL(), Perplexity()],
            )
            self.evaluator.validated[key] = {name: float(values[0]) for name, values in scores.items()}
        return dict(self.evaluator.validated[key])
