"""A scorer that takes its time, and keeps a list of what was scored."""

import os
import time
from pathlib import Path

from evosweep.evaluate.scorer import StagedScorer


class SlowScorer(StagedScorer):
    """The usual scorer; sleeps for every candidate, and then writes it down.

    Args:
        seconds: For each candidate.
        log: File with a line for each candidate: generation, stage, levels, process.
    """

    def __init__(self, evaluator, *, fitness, seed: int, seconds: float = 0.0, log: str | None = None) -> None:
        super().__init__(evaluator, fitness=fitness, seed=seed)
        self.seconds = seconds
        self.log = log

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        time.sleep(self.seconds * len(genomes))
        found = super().score(genomes, generation=generation, stage=stage, tokens=tokens)
        if self.log is not None:
            text = "".join(f"{generation} {stage} {genome.tobytes().hex()} {os.getpid()}\n" for genome in genomes)
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(text)
        return found
