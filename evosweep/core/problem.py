"""A search problem: units, their levels and a budget; numpy only."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.core.allocation import Allocation
from evosweep.core.errors import BudgetError, EvosweepError, SettingError, did_you_mean
from evosweep.core.files import digest
from evosweep.core.limits import Limit, within_limits
from evosweep.core.ties import by_layer, contracted
from evosweep.core.unit import Unit

Genome = npt.NDArray[np.int64]
"""Level index of every unit, shape (units,); index 0 is the cheapest level of that unit."""

TABLES = (
    "rises",
    "falls",
    "plateaus",
    "has_equal_costs",
    "sizes",
    "indices",
    "numels",
    "kinds",
    "gate",
    "gated",
    "least",
    "most",
    "total_levels",
)
"""Tables of a problem that do not depend on its budget."""


@dataclass(frozen=True)
class Problem:
    """Units with their ladders, and a bound on total cost.

    Attributes:
        units: In the order in which the model computes them.
        budget: Most bits that an allocation may cost.
        fixed_bits: Bits of what is not compressed (embeddings, norms, head), counted in megabytes only.
        limits: Further bounds that an allocation must hold.

    Raises:
        BudgetError: No allocation fits the budget.
        SettingError: A ladder is empty, unsorted or has a repeated name, or a unit name is repeated.
    """

    units: tuple[Unit, ...]
    budget: int
    fixed_bits: int = 0
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        if not self.units:
            raise SettingError("problem.units", allowed="at least one unit", got=0)
        names = [unit.name for unit in self.units]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SettingError("problem.units", allowed="units with different names", got=twice)
        for unit in self.units:
            costs = [level.cost for level in unit.levels]
            if any(not isinstance(cost, int | np.integer) for cost in costs):
                raise SettingError(f"cost of {unit.name}", allowed="whole bits", got=costs)
            if not costs or costs != sorted(costs) or len(set(unit.level_names)) != len(costs):
                raise SettingError(
                    f"levels of {unit.name}", allowed="one or more, named differently, by rising cost", got=costs
                )
        if self.budget < self.least:
            raise BudgetError(
                f"budget of {self.budget} bits ({self.bits_per_weight(self.budget):.3f} bits per weight) is below the "
                f"least that these levels allow: {self.least} bits ({self.bits_per_weight(self.least):.3f} bits per "
                f"weight); the most is {self.most} ({self.bits_per_weight(self.most):.3f})"
            )

    @functools.cached_property
    def costs(self) -> npt.NDArray[np.int64]:
        """Cost of every (unit, level) in bits, shape (units, longest ladder); past a ladder's end, -1."""
        table = np.full((len(self.units), max(len(unit.levels) for unit in self.units)), -1, dtype=np.int64)
        for row, unit in enumerate(self.units):
            table[row, : len(unit.levels)] = [level.cost for level in unit.levels]
        return table

    @functools.cached_property
    def plateaus(self) -> npt.NDArray[np.int64]:
        """Index of every level's cost among the distinct costs of its unit, shape as ``costs``; past the end, -1.

        Levels of one unit that cost the same share an index. Level 0 of a unit that gates others (it is dropped, and
        they with it) shares its index with no other level, even at equal cost.
        """
        steps = np.diff(self.costs, axis=1) > 0
        steps[self.gating, :1] = self.costs[self.gating, 1:2] >= 0
        numbers = np.concatenate([np.zeros((len(self.units), 1), dtype=np.int64), steps.cumsum(axis=1)], axis=1)
        return np.where(self.costs >= 0, numbers, -1)

    @functools.cached_property
    def next_up(self) -> npt.NDArray[np.int64]:
        """Lowest level that costs more, for every (unit, level), shape as ``costs``; -1 where there is none."""
        return self._next(lambda numbers, own: np.flatnonzero(numbers > own)[:1])

    @functools.cached_property
    def next_down(self) -> npt.NDArray[np.int64]:
        """Highest level that costs less, for every (unit, level), shape as ``costs``; -1 where there is none."""
        return self._next(lambda numbers, own: np.flatnonzero((numbers < own) & (numbers >= 0))[-1:])

    def _next(self, find: Callable[[npt.NDArray[np.int64], int], npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        table = np.full(self.costs.shape, -1, dtype=np.int64)
        for row, numbers in enumerate(self.plateaus):
            for level in range(self.sizes[row]):
                found = find(numbers, int(numbers[level]))
                if len(found):
                    table[row, level] = found[0]
        return table

    @functools.cached_property
    def rises(self) -> npt.NDArray[np.int64]:
        """What the next level that costs more costs in addition, for every (unit, level), shape as ``costs``.

        -1 where there is none.
        """
        higher = np.take_along_axis(self.costs, np.maximum(self.next_up, 0), axis=1)
        return np.where(self.next_up >= 0, higher - self.costs, -1)

    @functools.cached_property
    def falls(self) -> npt.NDArray[np.int64]:
        """What the next level that costs less saves, for every (unit, level), shape as ``costs``; -1 if none."""
        lower = np.take_along_axis(self.costs, np.maximum(self.next_down, 0), axis=1)
        return np.where(self.next_down >= 0, self.costs - lower, -1)

    @functools.cached_property
    def has_equal_costs(self) -> bool:
        """Whether some unit has levels that cost the same."""
        return bool((self.plateaus.max(axis=1) + 1 < self.sizes).any())

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Number of levels of every unit, shape (units,)."""
        return np.array([len(unit.levels) for unit in self.units], dtype=np.int64)

    @functools.cached_property
    def indices(self) -> npt.NDArray[np.int64]:
        """0, 1, 2 ... for every unit, shape (units,): row indices for tables that are read with a genome."""
        return np.arange(len(self.units))

    @functools.cached_property
    def total_levels(self) -> int:
        """Number of levels of all units together: no walk up or down the ladders takes more steps."""
        return int(self.sizes.sum())

    @functools.cached_property
    def numels(self) -> npt.NDArray[np.int64]:
        """Weights of every unit, shape (units,)."""
        return np.array([unit.numel for unit in self.units], dtype=np.int64)

    @functools.cached_property
    def kinds(self) -> npt.NDArray[np.int64]:
        """Index of every unit's kind, shape (units,): the same for units of that name in other blocks."""
        return np.unique([unit.kind for unit in self.units], return_inverse=True)[1]

    @functools.cached_property
    def gate(self) -> npt.NDArray[np.int64]:
        """Index of the unit that each unit is gated by, shape (units,); its own index, if by none."""
        index_of = {unit.name: index for index, unit in enumerate(self.units)}
        result = np.arange(len(self.units))
        for index, unit in enumerate(self.units):
            result[[index_of[name] for name in unit.gates]] = index
        return result

    @functools.cached_property
    def gating(self) -> npt.NDArray[np.bool_]:
        """Which units gate others, shape (units,)."""
        return np.array([bool(unit.gates) for unit in self.units])

    @functools.cached_property
    def gated(self) -> bool:
        """Whether any unit gates others."""
        return bool(self.gating.any())

    def alive(self, genome: Genome) -> npt.NDArray[np.bool_]:
        """Return which units are part of the model, shape (units,): gated ones only while their gate is not dropped."""
        if not self.gated:
            return np.ones(len(self.units), dtype=bool)
        return (self.gate == np.arange(len(self.units))) | (genome[self.gate] > 0)

    def prices(self, genome: Genome) -> npt.NDArray[np.int64]:
        """Return the cost of every unit's level in bits, shape (units,); 0 for units dropped with their gate."""
        costs = self.costs[self.indices, genome]
        return np.where(self.alive(genome), costs, 0) if self.gated else costs

    @functools.cached_property
    def least(self) -> int:
        """Bits of the cheapest allocation."""
        return self.cost(np.zeros(len(self.units), dtype=np.int64))

    @functools.cached_property
    def most(self) -> int:
        """Bits of the dearest allocation."""
        return sum(unit.levels[-1].cost for unit in self.units)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of units, ladders, costs and budget: two problems with one fingerprint are the same search."""
        ladders = [
            [u.name, u.numel, u.block, [[v.name, int(v.cost)] for v in u.levels], *([list(u.gates)] if u.gates else [])]
            for u in self.units
        ]
        limits = [[limit.name, int(limit.most), [list(amounts) for amounts in limit.amounts]] for limit in self.limits]
        return digest([ladders, int(self.budget), int(self.fixed_bits), *([limits] if limits else [])])

    def cost(self, genome: Genome) -> int:
        """Return the bits that the units take at the levels of a genome, shape (units,), without ``fixed_bits``.

        Units inside a dropped part cost nothing.
        """
        return int(self.prices(genome).sum())

    def feasible(self, genome: Genome) -> bool:
        """Return whether a genome, shape (units,), costs at most the budget and holds every further limit."""
        return self.cost(genome) <= self.budget and all(limit.used(genome) <= limit.most for limit in self.limits)

    def limit_figures(self, genome: Genome) -> dict[str, float]:
        """Return what a genome takes of every limit, by the limit's name, as users count it."""
        return {limit.name: limit.shown(limit.used(genome)) for limit in self.limits}

    def mean_bits(self, genome: Genome, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return true bits per weight of every group of units, shape (groups,).

        Args:
            genome: Shape (units,).
            groups: Index of every unit's group, from 0, shape (units,).
        """
        bits = np.bincount(groups, weights=self.prices(genome))
        return np.asarray(bits / np.maximum(np.bincount(groups, weights=self.numels), 1), dtype=np.float64)

    def bits_per_weight(self, bits: int) -> float:
        """Return ``bits`` divided by the number of weights of all units: 4.3 for 4-bit codes with their scales."""
        return bits / int(self.numels.sum())

    def sparsity(self, genome: Genome) -> float:
        """Return the share of all units' weights that are removed, one by one or with what is dropped.

        It is not the share of bits saved, since masks take space too; see ``cost``.
        """
        removed = np.array([unit.levels[level].removed for unit, level in zip(self.units, genome, strict=True)])
        return float(np.where(self.alive(genome), removed, 1.0) @ self.numels / self.numels.sum())

    def megabytes(self, bits: int) -> float:
        """Return the size of the whole model in 10⁶ bytes: ``bits`` for the units, plus ``fixed_bits`` for all else."""
        return (bits + self.fixed_bits) / 8e6

    def encode(self, allocation: Mapping[str, str]) -> Genome:
        """Return level indices, shape (units,), for unit name -> level name; tied layers may be named one by one.

        Raises:
            EvosweepError: A unit is missing or unknown, or has no level of that name, or tied layers differ.
        """
        allocation = contracted(self.units, allocation)
        known = {unit.name for unit in self.units}
        missing = [unit.name for unit in self.units if unit.name not in allocation]
        extra = [name for name in allocation if name not in known]
        if missing or extra:
            raise EvosweepError(
                f"allocation does not fit the problem: {len(missing)} units missing {missing[:3]}, "
                f"{len(extra)} unknown {extra[:3]}{did_you_mean(extra[0], known) if extra else ''}"
            )
        genome = np.empty(len(self.units), dtype=np.int64)
        for index, unit in enumerate(self.units):
            name = allocation[unit.name]
            if name not in unit.level_names:
                raise SettingError(f"level of {unit.name}", allowed=unit.level_names, got=name)
            genome[index] = unit.level_names.index(name)
        return genome

    def decode(self, genome: Genome) -> Allocation:
        """Return unit name -> level name for level indices, shape (units,); ``encode`` is the inverse."""
        pairs: Sequence[tuple[Unit, int]] = list(zip(self.units, map(int, genome), strict=True))
        return Allocation({unit.name: unit.levels[index].name for unit, index in pairs})

    def uniform(self) -> Genome:
        """Return the uniform allocation: the same level for all units, the highest one within the budget.

        Where ladders differ (sparsities that step by a number of weights), every unit takes its highest level up to
        one cost per weight. Units that gate others are kept.
        """
        same = len({unit.level_names for unit in self.units if not unit.gates}) == 1
        measure = np.arange(self.costs.shape[1])[None] if same else self.costs / self.numels[:, None]
        ratios = np.where(self.costs >= 0, np.where(self.gating[:, None], 0.0, measure), np.inf)
        thresholds = np.unique(ratios[np.isfinite(ratios)])

        def at(threshold: float) -> Genome:
            return np.maximum((ratios <= threshold * (1 + 1e-9)).sum(axis=1) - 1, 0)

        if self.limits:  # a dearer level may take less of a limit
            genomes = [at(threshold) for threshold in thresholds[::-1]]
            found = next((genome for genome in genomes if self.feasible(genome)), None)
            found = within_limits(self.costs, self.budget, self.limits) if found is None else found
            return np.zeros(len(self.units), dtype=np.int64) if found is None else found
        low = 0  # the lowest threshold leaves every unit at its bottom
        high = len(thresholds) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.feasible(at(thresholds[middle])):
                low = middle
            else:
                high = middle - 1
        genome = at(thresholds[low])
        return genome if self.feasible(genome) else np.zeros_like(genome)  # which has everything dropped

    def within(self, budget: int) -> "Problem":
        """Return the same problem under another budget, unchecked; tables of costs are shared."""
        for table in TABLES:  # worked out here, once, and not in every copy
            getattr(self, table)
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        object.__setattr__(other, "budget", max(int(budget), self.least))
        return other

    def only(self, genome: Genome) -> "Problem":
        """Return the problem in which every unit has no other level than in a genome."""
        units = [replace(unit, levels=(unit.levels[level],)) for unit, level in zip(self.units, genome, strict=True)]
        return replace(self, units=tuple(units), budget=sum(unit.levels[0].cost for unit in units), limits=())

    def save(self, allocation: Allocation, path: Path, **facts: Any) -> Path:
        """Write allocation.json: the level of every layer, tied ones one by one, and which are tied.

        Args:
            allocation: Level of every unit.
            path: Of the file.
            **facts: Further entries.
        """
        ties = [[layer.name for layer in unit.members] for unit in self.units if unit.members]
        return by_layer(self.units, allocation).save(path, **facts, **({"ties": ties} if ties else {}))
