"""Fitness of candidates on tokens drawn by place, and of a winner on the fixed validation set."""

import numpy as np
import numpy.typing as npt

from evosweep.core.problem import Genome
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity


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
        split = self.evaluator.splits["search"]
        count = split.count(f"search.stages[{stage}].tokens", tokens)
        draws = generator(self.seed, "tokens", generation, stage)
        windows = draws.choice(len(split.windows), size=count, replace=False).tolist()
        return self.evaluator.score(genomes, split="search", windows=windows, fitness=[self.fitness])[self.fitness.name]

    def validate(self, genome: Genome | None) -> dict[str, float]:
        """Return ``kl`` (nats per token) and ``ppl`` on the whole validation split; None is the dense model."""
        windows = range(len(self.evaluator.splits["validation"].windows))
        scores = self.evaluator.score(
            None if genome is None else genome[None], split="validation", windows=windows,
            fitness=[KL(), Perplexity()],
        )
        return {name: float(values[0]) for name, values in scores.items()}
