"""A search that uses what it measured: single moves are measured, then combined within a bounded number of changes.

Around the incumbent, the effect of every single move on the loss is measured on tokens that all share, so that its
standard error is known too. The effects are shrunk towards those of similar moves; the best sets of at most 6, 16, 40
... moves within the budget (the trust regions, within which effects are taken to add up) are proposed beside the
incumbent, and the best of them is the next incumbent. Pure: who scores is the caller's matter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.move_survey import Knowledge, MoveSurvey
from evosweep.search.moves import fill, repair
from evosweep.search.moves_table import MoveTable, best_moves


class TrustRegion:
    """Proposes combinations of measured moves; ``survey`` measures, ``propose`` combines.

    Args:
        problem: Units, ladders, budget.
        seed: Seeds all randomness, together with what it is used for.
        changes: Most changes of each trust region; None is any number.
        offspring: Proposals a generation: one for each trust region, the others from drawn effects.
    """

    def __init__(self, problem: Problem, *, seed: int, changes: Sequence[int | None], offspring: int) -> None:
        self.problem = problem
        self.seed = seed
        self.changes = tuple(changes)
        self.size = offspring
        self.knowledge = Knowledge()
        self.base: Genome | None = None
        self._survey: MoveSurvey | None = None

    def survey(self, base: Genome, *, windows: int, available: int) -> MoveSurvey:
        """Return the survey of the moves around a genome.

        Args:
            base: The incumbent, shape (units,).
            windows: Windows that a move is measured on, on average.
            available: Different windows that there are.
        """
        if self.base is not None and (self.base != base).any():
            self.knowledge.drift()
        self.base = base.copy()
        table = MoveTable.around(self.problem, base)
        self._survey = MoveSurvey(self.problem, table, self.knowledge.of(table), windows=windows, available=available)
        return self._survey

    def propose(self, *, generation: int) -> list[Genome]:
        """Return the proposals of a generation after its survey, all within the budget, none twice."""
        survey = self._survey
        if survey is None:
            raise RuntimeError("nothing was surveyed")
        self._survey = None
        table = survey.table
        self.knowledge.remember(table, *survey.combined())
        estimates = survey.estimates()
        drawn = max(self.size - len(self.changes), 0)
        noise = generator(self.seed, "effects", generation).standard_normal((drawn, len(table)))
        effects = np.concatenate(
            [
                np.repeat(estimates.mean[None], len(self.changes), axis=0),
                estimates.mean + noise * np.sqrt(estimates.variance),
            ]
        )
        changes = [self.changes[row % len(self.changes)] for row in range(len(effects))]
        slack = self.problem.budget - self.problem.cost(table.base)
        found: dict[bytes, Genome] = {}
        for row, choice in enumerate(best_moves(table, effects, slack=slack, changes=changes)):
            genome = self._legal(table.after(choice.moves), generation, row)
            found.setdefault(genome.tobytes(), genome)
        return list(found.values())[: self.size]

    def _legal(self, genome: Genome, generation: int, row: int) -> Genome:
        """Return a genome within the budget; where units gate others, costs of moves do not quite add up."""
        if not self.problem.feasible(genome):
            rng = generator(self.seed, "repair", generation, row)
            repair(self.problem, genome, rng)
            fill(self.problem, genome, rng)
        return genome

    def state(self) -> dict[str, Any]:
        """Return what it knows, as JSON."""
        return {"base": None if self.base is None else self.base.tolist(), "effects": self.knowledge.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        base = state["base"]
        self.base = None if base is None else np.array(base, dtype=np.int64)
        self.knowledge.restore(state["effects"])
