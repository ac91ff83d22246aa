"""A scorer that takes its time or waits for a file, and keeps a list of what was scored."""

import os
import time
from pathlib import Path

from evosweep.evaluate.scorer import StagedScorer

PATIENCE = 300.0  # seconds for the gate's file


class SlowScorer(StagedScorer):
    """The usual scorer; waits before it scores, sleeps for every candidate, and then writes it down.

    Args:
        seconds: For each candidate.
        log: File with a line for each candidate: generation, stage, levels, process.
        gate: File before which nothing is scored, so that a test has a search where it wants it; None: no waiting.
        gate_from: First generation that waits; what is scored after the last one waits always.
    """

    def __init__(
        self,
        evaluator,
        *,
        fitness,
        seed: int,
        seconds: float = 0.0,
        log: str | None = None,
        gate: str | None = None,
        gate_from: int = 0,
    ) -> None:
        super().__init__(evaluator, fitness=fitness, seed=seed)
        self.seconds = seconds
        self.log = log
        self.gate = None if gate is None else Path(gate)
        self.gate_from = gate_from

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        if generation >= self.gate_from:
            self._wait()
        time.sleep(self.seconds * len(genomes))
        found = super().score(genomes, generation=generation, stage=stage, tokens=tokens)
        if self.log is not None:
            text = "".join(f"{generation} {stage} {genome.tobytes().hex()} {os.getpid()}\n" for genome in genomes)
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(text)
        return found

    def score_all(self, genomes, *, limit: int | None = None):
        self._wait()
        return super().score_all(genomes, limit=limit)

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.gate is not None and not self.gate.exists():
            assert time.monotonic() < deadline, f"{self.gate} did not come"
            time.sleep(0.01)
