"""A compressor around another, and the format of its payloads: what somebody else's package would add."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.base import Compressor, LevelSpec, Payload, Plans, Statistics, identity
from evosweep.core.unit import Nominal


@dataclass(frozen=True)
class LowRankSpec:
    rank: int
    base: LevelSpec


class LowRank:
    """Adds the best fp16 matrix of a low rank to every level of another compressor."""

    def __init__(self, *, base: Compressor, ranks: Sequence[int] = (8,)) -> None:
        self.base = base
        self.ranks = list(ranks)

    @property
    def needs(self) -> frozenset[str]:
        return self.base.needs

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> Plans:
        plans = {}
        for unit, levels in self.base.plan(shapes).items():
            rows, columns = shapes[unit]
            made = [
                LevelSpec(
                    name=f"{level.name}+r{rank}",
                    cost=(cost := level.cost + 16 * rank * (rows + columns)),
                    nominal=Nominal("bits_per_weight", cost / (rows * columns)),
                    spec=LowRankSpec(rank, level),
                )
                for level in levels
                for rank in self.ranks
            ]
            plans[unit] = sorted(made, key=lambda level: level.cost)
        return plans

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        own = {unit: list(dict.fromkeys(level.spec.base for level in plans[unit])) for unit in weights}
        bases = self.base.compress(weights, statistics, own)
        return {
            unit: {
                level.name: around(weight, bases[unit][level.spec.base.name], level.spec.rank) for level in plans[unit]
            }
            for unit, weight in weights.items()
        }

    def describe(self) -> dict[str, Any]:
        return {"base": identity(self.base), "ranks": self.ranks}


def around(weight: torch.Tensor, base: Payload, rank: int) -> Payload:
    left, values, right = torch.linalg.svd(weight - base.weight, full_matrices=False)
    tensors = {"left": (left * values)[:, :rank].half(), "right": right[:rank].half()}
    return Payload(__name__, tensors, {"rank": rank}, {"base": base})


def decode(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload]) -> torch.Tensor:
    assert tensors["left"].shape[1] == meta["rank"]
    return parts["base"].weight + tensors["left"].float() @ tensors["right"].float()
