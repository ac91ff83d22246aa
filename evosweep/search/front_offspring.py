"""Offspring of a front of sizes: a parent's own size kept, another size, or two parents crossed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_int, check_number
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.batch_moves import BatchMoves, Genomes
from evosweep.search.mending import mend
from evosweep.search.moves import fill, repair
from evosweep.search.mutation import SIDESTEPS, Flips
from evosweep.search.size_bases import Base, SizeBases

SPAN = 0.1  # how far a parent's size is changed at most, as a share of the range of sizes
TRIES = 2  # of a mutation that changed nothing


class FrontOffspring:
    """Makes the offspring of parents of different sizes, as in a genetic algorithm of two objectives.

    A generation's offspring are made at once, by operations on a matrix of genomes; one by one where units gate others
    (dropped blocks), since what a gate drops or brings back is worked out step by step.

    Args:
        problem: Units and ladders; its budget is the largest size.
        seed: Seeds all randomness, together with what it is used for (generation; slot, where made one by one).
        mutation: Changes a genome at its size.
        least: Smallest size in bits.
        resize: Probability that an offspring gets another size than its parent.
        cross: Probability that it takes each unit's level from one of two parents; otherwise it keeps its size.
        base: Returns what an allocator without a search chooses under a budget. Resizing a parent keeps in which units
            it differs from that. None: random units are lowered or raised.
        sizes: Evenly spaced sizes for which the base is asked; between two, it is made of both.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int,
        mutation: Flips,
        least: int,
        resize: float = 0.4,
        cross: float = 0.2,
        base: Base | None = None,
        sizes: int = 12,
    ) -> None:
        self.problem = problem
        self.seed = check_int("seed", seed)
        self.mutation = mutation
        self.least = least
        self.resize = check_number("resize", resize, low=0, high=1)
        self.cross = check_number("cross", cross, low=0, high=1 - self.resize)
        knots = check_int("sizes", sizes, low=2)
        self.bases = None if base is None else SizeBases(problem, base=base, least=least, knots=knots, seed=self.seed)
        self._batch: BatchMoves | None = None

    def starts(self, count: int) -> list[Genome]:
        """Return genomes of evenly spaced sizes, the largest first; without a base, uniform ones that are filled up."""
        found = []
        for slot, size in enumerate(np.linspace(self.problem.budget, self.least, count).astype(np.int64).tolist()):
            here = self.problem.within(size)
            genome = here.uniform() if self.bases is None else self.bases.knot(size)
            fill(here, genome, generator(self.seed, "start", slot))
            found.append(genome)
        return found

    def generation(self, *, generation: int, parents: Sequence[Genome], chosen: Sequence[int]) -> list[Genome]:
        """Return a generation's offspring, all within the budget; they follow from seed, generation and parents.

        Args:
            generation: 1, 2 ...
            parents: The front, in any order.
            chosen: Index of the parent of every offspring.
        """
        if self.problem.gated:
            return [
                self.offspring(generation=generation, parents=parents, slot=slot, parent=parent)
                for slot, parent in enumerate(chosen)
            ]
        batch = self._moves()
        rng = generator(self.seed, "offspring", generation)
        front = np.stack(parents)
        genomes = front[list(chosen)]
        kinds = rng.random(len(genomes))
        resized = np.flatnonzero(kinds < self.resize)
        crossed = np.flatnonzero((kinds >= self.resize) & (kinds < self.resize + self.cross) & (len(parents) > 1))
        wanted = batch.costs(genomes)
        genomes[resized], wanted[resized] = self._all_resized(genomes[resized], wanted[resized], rng)
        genomes[crossed], wanted[crossed] = _all_crossed(batch, genomes[crossed], front, rng)
        moved = np.concatenate([resized, crossed])
        fitted = genomes[moved]
        batch.fit(fitted, wanted[moved], rng)
        genomes[moved] = fitted
        kept = np.setdiff1d(np.arange(len(genomes)), crossed)
        genomes[kept] = self._all_mutated(batch, genomes[kept], rng)
        if self.problem.limits:
            self._hold_limits(genomes, front[list(chosen)], rng)
        return list(genomes)

    def _hold_limits(self, genomes: Genomes, parents: Genomes, rng: np.random.Generator) -> None:
        """Make every genome hold the problem's limits; one that cannot becomes its parent. In place.

        Args:
            genomes: Shape (offspring, units).
            parents: Of each, shape (offspring, units).
            rng: Chooses the steps.
        """
        exceeded = np.zeros(len(genomes), dtype=bool)
        for limit in self.problem.limits:
            exceeded |= limit.table[self.problem.indices, genomes].sum(axis=1) > limit.most
        for row in np.flatnonzero(exceeded):
            if not mend(self.problem, genomes[row], rng):
                genomes[row] = parents[row]

    def costs(self, genomes: Sequence[Genome]) -> npt.NDArray[np.int64]:
        """Return the bits of every genome, shape (genomes,)."""
        if self.problem.gated:
            return np.array([self.problem.cost(genome) for genome in genomes])
        return self._moves().costs(np.stack(genomes))

    def _moves(self) -> BatchMoves:
        if self._batch is None:
            self._batch = BatchMoves(self.problem)
        return self._batch

    def _all_resized(
        self, genomes: Genomes, sizes: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Genomes, npt.NDArray[np.int64]]:
        """Return genomes that are about of other sizes, and these sizes, each near that of its parent.

        Args:
            genomes: Shape (offspring, units).
            sizes: Their bits, shape (offspring,).
            rng: Chooses the sizes.
        """
        reach = SPAN * (self.problem.budget - self.least)
        drawn = sizes + rng.uniform(-reach, reach, size=len(sizes))
        wanted = np.clip(drawn, self.least, self.problem.budget).astype(np.int64)
        if self.bases is not None:
            genomes = np.clip(genomes + self.bases.at(wanted) - self.bases.at(sizes), 0, self.problem.sizes - 1)
        return genomes, wanted

    def _all_mutated(self, batch: BatchMoves, genomes: Genomes, rng: np.random.Generator) -> Genomes:
        """Return genomes after the mutation's number of flips each, none unchanged where a legal move is found."""
        changed = genomes.copy()
        left = np.arange(len(genomes))
        for _ in range(TRIES):
            mine = changed[left]
            draws = 2 if self.mutation.flips == "min_of_two" else 1
            flips = rng.integers(1, self.mutation.max_flips + 1, size=(len(left), draws)).min(axis=1)
            if batch.has_equal_costs:
                aside = rng.binomial(flips, SIDESTEPS)
                for step in range(int(aside.max(initial=0))):
                    batch.sidestep(mine, np.flatnonzero(aside > step), rng)
                flips = flips - aside
            batch.flip(mine, flips, cross=self.mutation.cross, rng=rng)
            changed[left] = mine
            left = left[(mine == genomes[left]).all(axis=1)]
            if not len(left):
                break
        return changed

    def offspring(self, *, generation: int, parents: Sequence[Genome], slot: int, parent: int) -> Genome:
        """Return the offspring of a slot, within the budget.

        Args:
            generation: 1, 2 ...
            parents: The front, in any order.
            slot: Index among the generation's proposals.
            parent: Index of its parent.
        """
        rng = generator(self.seed, "offspring", generation, slot)
        genome = parents[parent]
        size = self.problem.cost(genome)
        kind = rng.random()
        if kind < self.resize:
            reach = SPAN * (self.problem.budget - self.least)
            wanted = int(np.clip(size + rng.uniform(-reach, reach), self.least, self.problem.budget))
            genome = self._resized(genome, size, wanted, rng)
        elif kind < self.resize + self.cross and len(parents) > 1:
            other = parents[int(rng.integers(len(parents)))]
            low, high = sorted((size, self.problem.cost(other)))
            mixed = np.where(rng.random(len(genome)) < 0.5, genome, other)
            return self._fitted(mixed, int(rng.integers(low, high + 1)), rng)
        return self.mutation(self.problem.within(max(self.problem.cost(genome), self.problem.least)), genome, rng)

    def _resized(self, genome: Genome, size: int, wanted: int, rng: np.random.Generator) -> Genome:
        """Return a genome of another size.

        Args:
            genome: Of a parent.
            size: Its bits.
            wanted: Bits that the result may have.
            rng: Chooses what is lowered or raised.
        """
        if self.bases is not None:
            now, then = self.bases.at(np.array([wanted, size]))
            genome = np.clip(genome + now - then, 0, self.problem.sizes - 1)
        return self._fitted(genome, wanted, rng)

    def _fitted(self, genome: Genome, wanted: int, rng: np.random.Generator) -> Genome:
        here = self.problem.within(max(wanted, self.problem.least))
        fitted = genome.copy()
        if not here.gated:  # what a gate drops or brings back is worked out step by step
            shift(here, fitted, rng)
        repair(here, fitted, rng)
        fill(here, fitted, rng)
        return fitted


def shift(problem: Problem, genome: Genome, rng: np.random.Generator) -> None:
    """Lower or raise random units by one step each, many at once, until a genome is about at the budget; in place.

    Args:
        problem: Units and ladders, none of which gates another.
        genome: Shape (units,); changed in place.
        rng: Chooses the units.
    """
    for _ in range(int(problem.sizes.max())):
        slack = problem.budget - int(problem.costs[problem.indices, genome].sum())
        table = problem.falls if slack < 0 else problem.rises
        moves = problem.next_down if slack < 0 else problem.next_up
        steps = table[problem.indices, genome]
        order = rng.permutation(np.flatnonzero(steps > 0))
        total = np.cumsum(steps[order])
        count = int(np.searchsorted(total, abs(slack), side="right")) + (1 if slack < 0 else 0)
        moved = order[:count]
        if not len(moved):
            return
        genome[moved] = moves[moved, genome[moved]]
        if count < len(order):
            return


def _all_crossed(
    batch: BatchMoves, genomes: Genomes, front: Genomes, rng: np.random.Generator
) -> tuple[Genomes, npt.NDArray[np.int64]]:
    """Return genomes that take each unit's level from themselves or another parent, and sizes between the two.

    Args:
        batch: Their moves.
        genomes: Shape (offspring, units).
        front: All parents, shape (parents, units).
        rng: Chooses the other parents, the units and the sizes.
    """
    others = front[rng.integers(len(front), size=len(genomes))]
    ends = np.sort(np.stack([batch.costs(genomes), batch.costs(others)]), axis=0)
    mixed = np.where(rng.random(genomes.shape, dtype=np.float32) < 0.5, genomes, others)
    return mixed, rng.integers(ends[0], ends[1] + 1)
