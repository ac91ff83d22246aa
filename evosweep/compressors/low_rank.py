"""Low rank on top of any compressor: the product of two thin matrices that makes up for its error.

EoRA (Liu et al., arXiv 2410.21271) and LoRC (ZeroQuant-V2, Yao et al., arXiv 2303.08302, section 4). The rank is part
of the level, so that a search may buy rank instead of bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from evosweep.compressors.base import Compressor, LevelSpec, Plans, identity, undominated
from evosweep.compressors.error_factors import correct
from evosweep.compressors.formats import plus_factors
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import SettingError


@dataclass(frozen=True)
class LowRankSpec:
    """A level of a base compressor with factors beside it.

    Attributes:
        base: The level as the base compressor planned it.
        rank: Rank of the factors; 0: none.
    """

    base: LevelSpec
    rank: int


class LowRank:
    """Offers every level of another compressor with factors of several ranks: ``3bit``, ``3bit+r2``, ``3bit+r4`` ...

    A level is called by the base level's number: 3 is the cheapest level of 3 bits, the one without factors.

    Args:
        base: Makes the levels that are corrected.
        method: ``eora`` makes a layer's output error smallest, ``lorc`` that of its weights.
        ranks: Ranks, rising, one level for each on every level of the base; 0: the base's level itself.
        factor_bits: Bits of a stored value of the factors: 16, or 8 with one fp16 scale a rank.
        keep: Which levels with factors are offered; the base's own always are. ``convex``: those whose output error is
            below that of every mix of two other levels at the same cost, so that a search over many units gains
            something from them. ``undominated``: those that no other level beats, at no more cost and no more error.
            ``all``.
    """

    def __init__(
        self,
        *,
        base: Compressor,
        method: str = "eora",
        ranks: Sequence[int] = (0, 2, 4, 8),
        factor_bits: int = 8,
        keep: str = "convex",
    ) -> None:
        if not callable(getattr(base, "plan", None)) or not callable(getattr(base, "compress", None)):
            raise SettingError("base", allowed="a compressor", got=base)
        self.base = base
        self.method = check_choice("method", method, ("eora", "lorc"))
        self.ranks = check_ranks(ranks)
        if factor_bits not in (8, 16) or isinstance(factor_bits, bool):
            raise SettingError("factor_bits", allowed="16 or 8", got=factor_bits)
        self.factor_bits = factor_bits
        self.keep = check_choice("keep", keep, KEPT)

    @property
    def needs(self) -> frozenset[str]:
        """What the base needs, and the second moment: errors are compared under it."""
        return self.base.needs | {SECOND_MOMENT}

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return every unit's levels, base levels times ranks, by rising cost.

        Raises:
            SettingError: A rank is above a layer's width, or the base's settings do not fit a shape.
        """
        plans = {}
        for unit, levels in self.base.plan(shapes).items():
            self._check_fits(unit, shapes)
            made = [self._with_factors(level, rank, *shapes[unit]) for level in levels for rank in self.ranks]
            names = [level.name for level in made]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise SettingError("base", owner=self, allowed="a compressor without factors of its own", got=twice)
            plans[unit] = sorted(made, key=lambda level: level.cost)
        return plans

    def _with_factors(self, level: LevelSpec, rank: int, rows: int, columns: int) -> LevelSpec:
        """Return a base level with factors of a rank beside it, for a layer (rows, columns)."""
        more = plus_factors.bits(rows=rows, columns=columns, rank=rank, factor_bits=self.factor_bits)
        name = f"{level.name}+r{rank}" if rank else level.name
        return replace(level, name=name, cost=level.cost + more, spec=LowRankSpec(level, rank))

    def _check_fits(self, unit: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise SettingError, with the layers and the largest rank that fits all, where the largest fits not this."""
        largest = self.ranks[-1]
        if largest <= min(shapes[unit]):
            return
        narrow = [name for name, shape in shapes.items() if largest > min(shape)]
        fits = min(min(shape) for shape in shapes.values())
        raise SettingError(
            "ranks",
            owner=self,
            got=largest,
            allowed=f"at most the width of every layer, min(out, in): {len(narrow)} layers ({narrow[0]} ...) are "
            f"narrower, and {fits} fits all",
        )

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input, in the order of their plans.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment, and what the base needs.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The base cannot make its levels.
        """
        moment = statistics.second_moment
        own = {unit: _base_levels(levels) for unit, levels in plans.items()}
        bases = self.base.compress(weights, statistics.only(self.base.needs), own)
        result = {}
        for unit, weight in weights.items():
            made = self._corrected(weight, moment, bases[unit])
            levels = [level for level in plans[unit] if level.name in made]
            errors = {name: payload.output_error(weight, moment) for name, payload in made.items()}
            worth = {level.name for level in KEPT[self.keep](levels, errors)}
            kept = [level.name for level in levels if level.name in worth or not level.spec.rank]
            result[unit] = {name: made[name] for name in kept or [levels[0].name]}
        return result

    def _corrected(
        self, weight: torch.Tensor, moment: torch.Tensor, bases: Mapping[str, Payload]
    ) -> dict[str, Payload]:
        """Return level name -> payload of every base level and rank of one layer.

        Args:
            weight: fp32, shape (out, in).
            moment: Second moment of its input, shape (in, in).
            bases: The base's payloads by level name.
        """
        differences = torch.stack([weight - base.weight for base in bases.values()])
        found = correct(
            differences,
            moment,
            rank=max(1, self.ranks[-1]),
            weighted=self.method == "eora",
            factor_bits=self.factor_bits,
        )
        made = {}
        for index, (name, base) in enumerate(bases.items()):
            for rank in self.ranks:
                error = found.errors[index][rank]
                if rank:
                    tensors = found.first(index, rank)
                    made[f"{name}+r{rank}"] = Payload(
                        plus_factors.__name__, tensors, {}, {plus_factors.BASE: base}, error
                    )
                else:
                    made[name] = replace(base, error=error)
        return made

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {
            "base": identity(self.base),
            "method": self.method,
            "ranks": self.ranks,
            "factor_bits": self.factor_bits,
            "keep": self.keep,
        }


def _base_levels(levels: Sequence[LevelSpec]) -> list[LevelSpec]:
    """Return the base levels of a unit's levels, each once, by rising cost."""
    bases = {level.spec.base.name: level.spec.base for level in levels}
    return sorted(bases.values(), key=lambda level: level.cost)


def convex(levels: Sequence[LevelSpec], errors: Mapping[str, float]) -> list[LevelSpec]:
    """Return the levels on the lower convex hull of error over cost, up to the one with the smallest error.

    Args:
        levels: Levels of one unit, by rising cost.
        errors: Output error by level name.
    """
    hull: list[LevelSpec] = []
    for level in undominated(levels, errors):
        while len(hull) > 1 and _slope(hull[-2], hull[-1], errors) >= _slope(hull[-1], level, errors):
            hull.pop()
        hull.append(level)
    return hull


def _slope(cheap: LevelSpec, dear: LevelSpec, errors: Mapping[str, float]) -> float:
    """Return by how much the error rises a bit between two levels of different costs."""
    return (errors[dear.name] - errors[cheap.name]) / (dear.cost - cheap.cost)


def _all(levels: Sequence[LevelSpec], errors: Mapping[str, float]) -> list[LevelSpec]:
    """Return all levels."""
    del errors
    return list(levels)


KEPT: Mapping[str, Callable[[Sequence[LevelSpec], Mapping[str, float]], list[LevelSpec]]] = {
    "convex": convex,
    "undominated": undominated,
    "all": _all,
}


def check_ranks(ranks: object) -> list[int]:
    """Return the ranks that the argument ``ranks`` lists, from 0, rising.

    Raises:
        SettingError: They are no such list.
    """
    found: list[int] = list(ranks) if isinstance(ranks, Sequence) and not isinstance(ranks, str) else [ranks]  # type: ignore[list-item]
    if not found:
        raise SettingError("ranks", allowed="a list of ranks from 0", got=found)
    for rank in found:
        check_int("ranks", rank, low=0)
    if found != sorted(set(found)):
        raise SettingError("ranks", allowed="rising, each rank once", got=found)
    return found
