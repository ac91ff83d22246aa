"""Mutation: how an offspring is made from its parent."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.problem import Genome, Problem
from evosweep.search.block_groups import ENTROPY, dependent_groups
from evosweep.search.mending import mend
from evosweep.search.moves import LIGHT_TRIES, exchange, fill, sidestep, swap

TRIES = 16
FLIPS = ("min_of_two", "uniform")
GROUPS = ("size", "name", "entropy", "none")
SIDESTEPS = 1 / 3  # share of flips that move among levels of equal cost, where some unit has such levels


class Mutation(Protocol):
    """A strategy that makes an offspring of a parent."""

    def __call__(self, problem: Problem, parent: Genome, rng: np.random.Generator) -> Genome:
        """Return an offspring within the budget; the parent itself stays as it is.

        Args:
            problem: Units, ladders, budget.
            parent: A feasible genome, shape (units,).
            rng: The offspring's own generator.
        """


class Flips:
    """EvoPress's mutation: a few flips, each a swap of equal costs or an exchange (arXiv 2410.14649, section 3).

    Args:
        max_flips: Largest number of flips.
        cross: Probability that a flip is an exchange between units of any size instead of a swap between units
            of equal cost step. Where no swap is possible, an exchange is tried anyway. 0 is the paper's search.
        flips: Distribution of the number of flips: ``min_of_two`` is min(U{1..max_flips}, U{1..max_flips}), few
            likelier than many (the paper's); ``uniform`` is U{1..max_flips}.
        group: Which units may swap: those whose steps cost the same (``size``), of these only the ones with the same
            name in their blocks (``name``), only those in neighbouring blocks that depend on one another by the entropy
            of their activations (``entropy``, as Q-VLM groups blocks), or none (``none``): every flip is an exchange.
        light: Give up early on exchanges where hardly anything can be lowered, as ``moves.exchange``.
    """

    def __init__(
        self,
        *,
        max_flips: int = 3,
        cross: float = 0.5,
        flips: str = "min_of_two",
        group: str = "size",
        light: bool = False,
    ) -> None:
        self.light = light
        self.max_flips = check_int("max_flips", max_flips, low=1)
        self.cross = check_number("cross", cross, low=0, high=1)
        self.flips = check_choice("flips", flips, FLIPS)
        self.group = check_choice("group", group, GROUPS)
        self.columns = (ENTROPY,) if group == "entropy" else ()
        self._grouped: tuple[Problem, npt.NDArray[np.int64]] | None = None

    def __call__(self, problem: Problem, parent: Genome, rng: np.random.Generator) -> Genome:
        """Return an offspring within the budget that differs from its parent wherever any legal move exists."""
        draws = 2 if self.flips == "min_of_two" else 1
        for _ in range(LIGHT_TRIES if self.light else TRIES):
            genome = parent.copy()
            for _ in range(int(rng.integers(1, self.max_flips + 1, size=draws).min())):
                self._flip(problem, genome, rng)
            if problem.limits:
                if not mend(problem, genome, rng):
                    continue
                fill(problem, genome, rng)
            if (genome != parent).any():
                return genome
        return parent.copy()

    def _flip(self, problem: Problem, genome: Genome, rng: np.random.Generator) -> None:
        """Change a genome by one flip, in place."""
        if problem.has_equal_costs and rng.random() < SIDESTEPS and sidestep(problem, genome, rng):
            return
        crossing = rng.random() < self.cross or self.group == "none"
        if not crossing and swap(problem, genome, rng, among=self._labels(problem)):
            return
        if not exchange(problem, genome, rng, light=self.light) and problem.has_equal_costs:
            sidestep(problem, genome, rng)  # where nothing can be raised, it is the only move

    def _labels(self, problem: Problem) -> npt.NDArray[np.int64] | None:
        """Return the label that units must share to swap, shape (units,); None: any two may."""
        if self.group == "name":
            return problem.kinds
        if self.group != "entropy":
            return None
        if self._grouped is None or self._grouped[0] is not problem:
            self._grouped = (problem, dependent_groups(problem))
        return self._grouped[1]
