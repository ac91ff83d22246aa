"""Unit, level, problem and allocation: all that a search needs to know, and no torch."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.core.errors import BudgetError, EvosweepError, SettingError, did_you_mean
from evosweep.core.files import digest, write_json

Genome = npt.NDArray[np.int64]
"""Level index of every unit, shape (units,); index 0 is the cheapest level of that unit."""


@dataclass(frozen=True)
class Level:
    """One setting that a unit can take.

    Attributes:
        name: Short and unique within the unit, e.g. ``3bit``; what Optuna and allocation.json show.
        cost: Size in bits of the exported form: codes, scales, zeros, masks.
        error: Layer-output error ‖(W−Ŵ)x‖², (weighted) mean over the calibration tokens x, if known.
        relative_error: The same over the mean of ‖Wx‖².
        value: What a heatmap colours by (bits per weight's nominal part, sparsity ...).
        removed: Share of the unit's weights that are not there any more.
    """

    name: str
    cost: int
    error: float | None = None
    relative_error: float | None = None
    value: float | None = None
    removed: float = 0.0


@dataclass(frozen=True)
class Unit:
    """What gets a setting of its own.

    Attributes:
        name: Path of the module in the model.
        numel: Weights in it.
        block: Index of the decoder block that holds it.
        levels: Its ladder, by rising cost.
        columns: Numbers about it that allocators read (outlier ratios, sensitivities ...).
        gates: Names of units that are gone, cost and all, while this one is at its lowest level: what is inside a
            dropped sub-block.
    """

    name: str
    numel: int
    block: int
    levels: tuple[Level, ...]
    columns: Mapping[str, float] = field(default_factory=dict)
    gates: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Its path inside the block, the same for its siblings in other blocks: ``self_attn.q_proj``."""
        return self.name.split(f".{self.block}.", 1)[-1]

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the ladder, cheapest first."""
        return tuple(level.name for level in self.levels)


class Allocation(Mapping[str, str]):
    """An immutable, hashable map of unit name to level name."""

    __slots__ = ("_items", "_levels")

    def __init__(self, levels: Mapping[str, str]) -> None:
        self._levels = dict(levels)
        self._items = tuple(sorted(self._levels.items()))

    def __getitem__(self, unit: str) -> str:
        return self._levels[unit]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self._items == other._items

    def __repr__(self) -> str:
        return f"Allocation({len(self)} units, {digest(self._items, length=8)})"

    @property
    def hash(self) -> str:
        """Content hash, the same in every process."""
        return digest(self._items)

    def save(self, path: Path, **facts: Any) -> Path:
        """Write allocation.json: ``facts`` beside the levels."""
        return write_json(path, {**facts, "allocation": self._levels})

    @classmethod
    def load(cls, path: Path) -> "Allocation":
        """Read what ``save`` wrote.

        Raises:
            EvosweepError: The file is not there or holds no allocation.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls({str(unit): str(level) for unit, level in value["allocation"].items()})
        except OSError as error:
            raise EvosweepError(f"allocation file {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvosweepError(f"{path} is not an allocation.json (a JSON object with 'allocation')") from error


@dataclass(frozen=True)
class Problem:
    """Units with their ladders, and a bound on total cost.

    Attributes:
        units: In the order in which the model computes them.
        budget: Most bits that an allocation may cost.
        fixed_bits: Bits of what is not compressed (embeddings, norms, head), counted in megabytes only.

    Raises:
        BudgetError: No allocation fits the budget.
        SettingError: A ladder is empty, unsorted or has a repeated name, or a unit name is repeated.
    """

    units: tuple[Unit, ...]
    budget: int
    fixed_bits: int = 0

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
    def rises(self) -> npt.NDArray[np.int64]:
        """What one level more costs at every (unit, level), shape as ``costs``; -1 where there is none."""
        table = np.full(self.costs.shape, -1, dtype=np.int64)
        table[:, :-1] = np.where(self.costs[:, 1:] >= 0, np.diff(self.costs, axis=1), -1)
        return table

    @functools.cached_property
    def falls(self) -> npt.NDArray[np.int64]:
        """What one level less frees at every (unit, level), shape as ``costs``; -1 where there is none."""
        return np.concatenate([np.full((len(self.units), 1), -1, dtype=np.int64), self.rises[:, :-1]], axis=1)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Number of levels of every unit, shape (units,)."""
        return np.array([len(unit.levels) for unit in self.units], dtype=np.int64)

    @functools.cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """0, 1, 2 ... for every unit, shape (units,): the rows of a table that is read by genome."""
        return np.arange(len(self.units))

    @functools.cached_property
    def rungs(self) -> int:
        """Levels of all units together: no walk up or down the ladders takes more steps."""
        return int(self.sizes.sum())

    @functools.cached_property
    def numels(self) -> npt.NDArray[np.int64]:
        """Weights of every unit, shape (units,)."""
        return np.array([unit.numel for unit in self.units], dtype=np.int64)

    @functools.cached_property
    def kinds(self) -> npt.NDArray[np.int64]:
        """Number of each unit's kind, shape (units,): the same for siblings in other blocks."""
        return np.unique([unit.kind for unit in self.units], return_inverse=True)[1]

    @functools.cached_property
    def gate(self) -> npt.NDArray[np.int64]:
        """Place of the unit that each unit is gated by, shape (units,); its own place, if by none."""
        places = {unit.name: place for place, unit in enumerate(self.units)}
        result = np.arange(len(self.units))
        for place, unit in enumerate(self.units):
            result[[places[name] for name in unit.gates]] = place
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
        """Return which units are there at all, shape (units,): gated ones only while their gate is open."""
        if not self.gated:
            return np.ones(len(self.units), dtype=bool)
        return (self.gate == np.arange(len(self.units))) | (genome[self.gate] > 0)

    def prices(self, genome: Genome) -> npt.NDArray[np.int64]:
        """Return what each unit's level costs in bits, shape (units,); nothing where it is not there."""
        costs = self.costs[self.places, genome]
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
        return digest([ladders, int(self.budget), int(self.fixed_bits)])

    def cost(self, genome: Genome) -> int:
        """Total bits of a genome, shape (units,)."""
        return int(self.prices(genome).sum())

    def feasible(self, genome: Genome) -> bool:
        """Whether a genome fits the budget."""
        return self.cost(genome) <= self.budget

    def mean_bits(self, genome: Genome, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return true bits per weight of every group of units, shape (groups,).

        Args:
            genome: Shape (units,).
            groups: Number of each unit's group, from 0, shape (units,).
        """
        bits = np.bincount(groups, weights=self.prices(genome))
        return np.asarray(bits / np.maximum(np.bincount(groups, weights=self.numels), 1), dtype=np.float64)

    def bits_per_weight(self, bits: int) -> float:
        """Bits over all weights of the units."""
        return bits / int(self.numels.sum())

    def sparsity(self, genome: Genome) -> float:
        """Share of all units' weights that are removed, one by one or with what is dropped: dense-equivalent sparsity.

        Beside it, a genome's cost says what that is worth: masks take space too.
        """
        removed = np.array([unit.levels[level].removed for unit, level in zip(self.units, genome, strict=True)])
        return float(np.where(self.alive(genome), removed, 1.0) @ self.numels / self.numels.sum())

    def megabytes(self, bits: int) -> float:
        """Size of the whole model in 10⁶ bytes: the units at ``bits`` plus everything that is not compressed."""
        return (bits + self.fixed_bits) / 8e6

    def encode(self, allocation: Mapping[str, str]) -> Genome:
        """Turn unit -> level names into level indices.

        Raises:
            EvosweepError: A unit is missing or unknown, or has no level of that name.
        """
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
        """Turn level indices into an allocation."""
        pairs: Sequence[tuple[Unit, int]] = list(zip(self.units, map(int, genome), strict=True))
        return Allocation({unit.name: unit.levels[index].name for unit, index in pairs})

    def uniform(self) -> Genome:
        """Return the dearest genome within the budget that treats all units alike.

        Where all have the same ladder (bit-widths), that is one level for all. Where they do not (sparsities that step
        by a number of weights), each unit takes its dearest level up to one cost per weight. Nothing with other units
        in it is dropped.
        """
        same = len({unit.level_names for unit in self.units if not unit.gates}) == 1
        measure = np.arange(self.costs.shape[1])[None] if same else self.costs / self.numels[:, None]
        ratios = np.where(self.costs >= 0, np.where(self.gating[:, None], 0.0, measure), np.inf)
        thresholds = np.unique(ratios[np.isfinite(ratios)])

        def at(threshold: float) -> Genome:
            return np.maximum((ratios <= threshold * (1 + 1e-9)).sum(axis=1) - 1, 0)

        low, high = 0, len(thresholds) - 1  # the lowest threshold leaves every unit at its bottom
        while low < high:
            middle = (low + high + 1) // 2
            if self.feasible(at(thresholds[middle])):
                low = middle
            else:
                high = middle - 1
        genome = at(thresholds[low])
        return genome if self.feasible(genome) else np.zeros_like(genome)  # which has everything dropped
