"""Size and loss in one search: EvoPress's moves with NSGA-II's survival, as in SimQ-NAS (arXiv 2312.13301)."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna._hypervolume import compute_hypervolume
from optuna.study._multi_objective import _fast_non_domination_rank

from evosweep.allocators.base import Allocator, allocate
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Candidate
from evosweep.core.genomes import genome_from_text, genome_to_text
from evosweep.core.latency import MILLISECONDS, times_of
from evosweep.core.metrics import SIZE_MB
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.search.front_offspring import FrontOffspring
from evosweep.search.mutation import Flips
from evosweep.search.size_model import SizeModel

Floats = npt.NDArray[np.float64]
MEMORY = 8  # generations that the model of losses is fitted to
SIZE = "size"
AGAINST = (SIZE, MILLISECONDS)
BROKEN = 1e9  # loss of a genome whose loss is no number


class TwoObjectivesSampler(EvoPressSampler):
    """Searches a front of sizes and losses at once; the largest size is the budget, and its genome is the elite.

    Candidates survive a stage by non-domination and crowding (NSGA-II, Deb et al. 2002), both computed by Optuna. In a
    ``study.optimize`` with one objective, parents are the best by value.

    Args:
        problem: Units, ladders, budget.
        seed: Same seed, same proposals.
        offspring: Proposals a generation.
        population_size: Parents: the points of the front that are kept.
        smallest: Smallest size of interest, as a share of the way from the least that levels allow (0) to the budget.
        resize: Probability that an offspring has another size than its parent.
        cross: Probability that it is crossed from two parents.
        screen: Proposals for each offspring; a ridge model of all losses so far keeps the least dominated of them. 1
            keeps all.
        max_flips: Largest number of flips of an offspring that keeps its size.
        against: What is minimized beside the loss: ``size``, or ``milliseconds`` of the kernels, which levels know by
            ``objective.latency``. The budget bounds the size either way.
        start: An allocator, whose choices at all sizes are the first generation; null: uniform ones.

    Raises:
        SettingError: A setting is out of range.
    """

    name = "nsga2_evopress"
    ranks = True

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        offspring: int = 64,
        population_size: int = 12,
        smallest: float = 0.0,
        resize: float = 0.4,
        cross: float = 0.2,
        screen: int = 4,
        max_flips: int = 3,
        against: str = SIZE,
        start: str | Path | Allocator | None = None,
    ) -> None:
        if isinstance(start, str | Path):
            raise SettingError(
                "start", allowed="null or an allocator, which has a choice for every size", got=str(start)
            )
        super().__init__(
            problem,
            seed=seed,
            offspring=offspring,
            max_flips=max_flips,
            population_size=check_int("population_size", population_size, low=2),
            start=start,
        )
        self.against = check_choice("against", against, AGAINST)
        self.axis = SIZE_MB if against == SIZE else MILLISECONDS
        self._times = None if against == SIZE else times_of(problem.units, setting="against")
        share = check_number("smallest", smallest, low=0, high=1)
        self.screen = check_int("screen", screen, low=1)
        allocator = start
        self.front = FrontOffspring(
            problem,
            seed=seed,
            mutation=Flips(max_flips=max_flips, light=True),
            least=int(problem.least + share * (problem.budget - problem.least)),
            resize=resize,
            cross=cross,
            base=None if allocator is None else lambda here: allocate(allocator, here),
        )
        self._all_sizes: list[Genome] | None = None
        self._model = SizeModel(problem, memory=MEMORY)
        self._parents_of: tuple[int, int, list[int]] = (0, 0, [])  # generation, number of parents, parent of each slot
        self._taught: deque[tuple[list[str], list[float]]] = deque(maxlen=MEMORY)
        self._ranked: tuple[Floats, Floats] | None = None  # sizes and losses of the last ranking
        self._reference: float | None = None

    def genomes(self, *, generation: int, parents: Sequence[Genome]) -> list[Genome]:
        """Return the starts, or the offspring of ``parents``."""
        if generation == 0 or not parents:
            return self._start()
        count = self.search.size * (1 if self.screen == 1 or not self._model.ready else self.screen)
        chosen = self._parent_indices(generation=generation, proposals=count, parents=len(parents))
        proposed = self.front.generation(generation=generation, parents=parents, chosen=chosen)
        kept = list(range(count)) if count == self.search.size else self._screened(proposed, parents)
        self._parents_of = (generation, len(parents), [chosen[index] for index in kept])
        return [proposed[index] for index in kept]

    def parent_index(self, *, generation: int, slot: int, count: int) -> int:
        """Return the index, among ``count`` parents, of the parent of a slot's offspring.

        Args:
            generation: 1, 2 ...
            slot: Index of the offspring in its generation.
            count: Number of parents.
        """
        if self._parents_of[:2] == (generation, count) and slot < len(self._parents_of[2]):
            return self._parents_of[2][slot]
        return self._parent_indices(generation=generation, proposals=self.search.size, parents=count)[slot]

    def _parent_indices(self, *, generation: int, proposals: int, parents: int) -> list[int]:
        """Return the index of the parent of every proposal, by lot.

        Args:
            generation: 1, 2 ...
            proposals: How many there are.
            parents: How many parents there are.
        """
        drawn = generator(self.seed, "parents", generation).integers(parents, size=proposals)
        return [int(index) for index in drawn]

    def order(self, genomes: Sequence[Genome], losses: Floats) -> list[int]:
        """Return candidate indices, best first: the lowest loss, then by non-domination, then by crowding.

        Args:
            genomes: Shape (units,) each.
            losses: On the same tokens, shape (genomes,); infinite for those that are broken.
        """
        sizes = self.sizes(genomes)
        finite = np.where(np.isfinite(losses), losses, BROKEN)
        self._ranked = (sizes, finite)
        ranked = nsga2_order(sizes, finite)
        best = int(np.lexsort((sizes, finite))[0])
        return [best, *(index for index in ranked if index != best and np.isfinite(losses[index]))] + [
            index for index in ranked if index != best and not np.isfinite(losses[index])
        ]

    def sizes(self, genomes: Sequence[Genome]) -> Floats:
        """Return what is minimized beside the loss, shape (genomes,): bits, or milliseconds."""
        if self._times is None:
            return self.front.costs(genomes).astype(np.float64)
        return np.asarray(self._times[self.problem.indices, np.stack(genomes)].sum(axis=1))

    def _range(self) -> tuple[float, float]:
        """Return the smallest and the largest of what is minimized beside the loss."""
        if self._times is None:
            return self.front.least, self.problem.budget
        known = np.where(self.problem.costs >= 0, self._times, np.nan)
        return float(np.nanmin(known, axis=1).sum()), float(np.nanmax(known, axis=1).sum())

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Learn the first stage's losses of a generation, for the screening of the next ones."""
        scored = [c for c in candidates if c.scores and c.duplicate_of is None]
        losses = np.array([max(c.scores[min(c.scores)], 1e-12) for c in scored])
        self._taught.append(([genome_to_text(self.problem, c.genome) for c in scored], np.log(losses).tolist()))
        self._model.learn([c.genome for c in scored], self._taught[-1][1])
        if self._reference is None and scored:
            last = max(max(c.scores) for c in scored)
            self._reference = max(c.scores[last] for c in scored if c.scores.get(last, BROKEN) < BROKEN)

    def facts(self) -> Mapping[str, float]:
        """Return the hypervolume and the number of points of the front that was ranked last.

        The volume is between the front and a reference point: the largest size, and the loss of the first generation's
        worst. Sizes count from the smallest on, and both are scaled to 1.
        """
        if self._ranked is None or self._reference is None:
            return {}
        sizes, losses = self._ranked
        least, most = self._range()
        return {
            "hypervolume": hypervolume(sizes, losses, least=least, most=most, worst=self._reference),
            "front": float(np.unique(front_of(sizes, losses)).size),
        }

    def state(self) -> dict[str, Any]:
        """Return what its model was taught, and the reference point of hypervolumes, as JSON."""
        return {"kind": self.name, "taught": [list(pair) for pair in self._taught], "reference": self._reference}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned.

        Raises:
            EvosweepError: The state is that of another sampler.
        """
        if state.get("kind") != self.name:
            raise EvosweepError(f"the saved search was made by sampler {state.get('kind')!r}, this one is {self.name}")
        self._reference = state["reference"]
        for texts, losses in state["taught"]:
            self._taught.append((list(texts), list(losses)))
            self._model.learn([genome_from_text(self.problem, text) for text in texts], losses)

    def _start(self) -> list[Genome]:
        if self._all_sizes is None:  # not earlier: the allocator's columns may not be measured yet
            self._all_sizes = self.front.starts(self.population_size)
        return [genome.copy() for genome in self._all_sizes]

    def _screened(self, proposed: Sequence[Genome], parents: Sequence[Genome]) -> list[int]:
        """Return the indices of as many proposals as a generation has, least dominated by the model; none twice."""
        known = {genome.tobytes() for genome in parents}
        distinct: dict[bytes, int] = {}
        for index, genome in enumerate(proposed):
            key = genome.tobytes()
            if key not in known:
                distinct.setdefault(key, index)
        indices = list(distinct.values()) or list(range(self.search.size))
        genomes = [proposed[index] for index in indices]
        sizes = self.sizes(genomes)
        order = nsga2_order(sizes, self._model.predict(genomes), count=self.search.size)
        return sorted(indices[index] for index in order)


def nsga2_order(sizes: Floats, losses: Floats, *, count: int | None = None) -> list[int]:
    """Return indices by non-domination rank and crowding distance, the best first.

    Args:
        sizes: Shape (points,).
        losses: Shape (points,).
        count: How many indices at most; None: all.
    """
    ranks = _fast_non_domination_rank(np.stack([sizes, losses], axis=1), n_below=count)
    order: list[int] = []
    for rank in range(int(ranks.max(initial=-1)) + 1):
        if count is not None and len(order) >= count:
            break
        members = np.flatnonzero(ranks == rank)
        distances = crowding(sizes[members]) + crowding(losses[members])
        order += members[np.argsort(-distances, kind="stable")].tolist()
    return order[:count]


def crowding(values: Floats) -> Floats:
    """Return how far apart the two neighbours of each value are, over the range of all; infinite at both ends.

    Summed over objectives it is the crowding distance of NSGA-II (Deb et al. 2002, section III-B).

    Args:
        values: Of one objective, shape (points,).
    """
    order = np.argsort(values, kind="stable")
    spread = float(values[order[-1]] - values[order[0]])
    if spread <= 0:
        return np.zeros(len(values))
    gaps = np.full(len(values), np.inf)
    gaps[order[1:-1]] = (values[order[2:]] - values[order[:-2]]) / spread
    return gaps


def front_of(sizes: Floats, losses: Floats) -> npt.NDArray[np.int64]:
    """Return the indices of the points that no other dominates, the largest size first; of equal ones, the first."""
    order = np.lexsort((np.arange(len(sizes)), losses, sizes))
    found = []
    best = np.inf
    for index in order.tolist():
        if losses[index] < best:
            best = float(losses[index])
            found.append(index)
    return np.array(found[::-1], dtype=np.int64)


def hypervolume(sizes: Floats, losses: Floats, *, least: float, most: float, worst: float) -> float:
    """Return the share of sizes and losses that is dominated by points, from 0 to 1; computed by Optuna.

    Args:
        sizes: Shape (points,).
        losses: Shape (points,).
        least: Smallest size.
        most: Largest size; with ``worst``, the reference point.
        worst: Largest loss.
    """
    points = np.stack([(sizes - least) / ((most - least) or 1.0), losses / worst], axis=1)
    inside = points[(points <= 1).all(axis=1)]
    return float(compute_hypervolume(np.maximum(inside, 0.0), np.ones(2))) if len(inside) else 0.0
