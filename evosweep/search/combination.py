"""A search that uses what it measured: single moves are measured, then combined within a bounded number of changes.

Around the incumbent, the effect of every single move on the loss is measured on tokens that all share, so that its
standard error is known too. The effects are shrunk towards those of similar moves; the best sets of at most 6, 16, 40
... moves within the budget (the trust regions, within which effects are taken to add up) are proposed beside the
incumbent, and the best of them is the next incumbent. Pure: who scores is the caller's matter.
"""

from collections.abc import Sequence

import numpy as np

from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.effects import Estimates
from evosweep.search.move_survey import MoveSurvey, Surveyor
from evosweep.search.moves import fill, repair
from evosweep.search.moves_table import Floats, MoveTable, best_moves
from evosweep.search.protocols import Text

LEAST_CHANGES = 2  # of the smallest trust region: one unit gives what another takes


class TrustRegion:
    """Combines the moves around an incumbent that a surveyor knows something of.

    While proposals do not move the incumbent, their trust regions halve, as where a model of a loss fails: effects of
    many moves do not add up, or no longer gain what tokens can tell. Regions that become alike are one, and effects
    are drawn for the proposals that this frees.

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
        self.surveyor = Surveyor(problem)
        self.failures = 0

    def survey(self, base: Genome, *, tokens: int, text: Text) -> MoveSurvey:
        """Return the survey of the moves around the incumbent, and note whether the last proposals failed to move it.

        Args:
            base: The incumbent, shape (units,).
            tokens: Tokens that a move is measured on, on average.
            text: The text that there is.
        """
        before = self.surveyor.base
        self.failures = self.failures + 1 if before is not None and (before == base).all() else 0
        return self.surveyor.survey(base, tokens=tokens, text=text)

    @property
    def limits(self) -> tuple[int | None, ...]:
        """The most changes of each trust region now: halved with every generation that did not move the incumbent."""
        if not self.failures:
            return self.changes
        units = len(self.problem.units)
        halved = ((units if limit is None else min(limit, units)) >> self.failures for limit in self.changes)
        return tuple(dict.fromkeys(max(limit, LEAST_CHANGES) for limit in halved))

    def propose(self, *, generation: int, base: Genome) -> list[Genome]:
        """Return the proposals of a generation, all within the budget, none twice.

        Args:
            generation: 1, 2 ...
            base: The incumbent, shape (units,).
        """
        table, estimates = self.surveyor.estimates(base)
        limits = self.limits
        regions = len(limits)
        effects = np.concatenate(
            [
                np.repeat(estimates.mean[None], regions, axis=0),
                drawn_effects(estimates, self.seed, generation, rows=max(self.size - regions, 0)),
            ]
        )
        changes = [limits[row % regions] for row in range(len(effects))]
        found: dict[bytes, Genome] = {}
        for genome in combined(self.problem, table, effects, changes=changes, seed=self.seed, generation=generation):
            found.setdefault(genome.tobytes(), genome)
        return list(found.values())[: self.size]


def drawn_effects(estimates: Estimates, seed: int, generation: int, *, rows: int) -> Floats:
    """Return effects drawn from what is believed of them (Thompson sampling), shape (rows, moves).

    Args:
        estimates: What is believed.
        seed: Of the search.
        generation: Draws differ by it.
        rows: How many draws.
    """
    noise = generator(seed, "effects", generation).standard_normal((rows, len(estimates.mean)))
    return np.asarray(estimates.mean + noise * np.sqrt(estimates.variance))


def combined(
    problem: Problem, table: MoveTable, effects: Floats, *, changes: Sequence[int | None], seed: int, generation: int
) -> list[Genome]:
    """Return, for each row of effects, the base after the best moves, within the budget.

    Args:
        problem: Units, ladders, budget.
        table: Moves around the base.
        effects: Shape (rows, moves).
        changes: Most moves of each row.
        seed: Of the search.
        generation: With seed and row, seeds repairs, which only units that gate others need: their costs do not add up.
    """
    slack = problem.budget - problem.cost(table.base)
    genomes = []
    for row, choice in enumerate(best_moves(table, effects, slack=slack, changes=changes)):
        genome = table.after(choice.moves)
        if not problem.feasible(genome):
            rng = generator(seed, "repair", generation, row)
            if not repair(problem, genome, rng):
                genome = table.base.copy()
            fill(problem, genome, rng)
        genomes.append(genome)
    return genomes
