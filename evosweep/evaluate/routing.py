"""Stand-in forwards with which the rows of a population go through one layer, each at its own level."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evosweep.models.device import moved

Forward = Callable[[torch.Tensor], torch.Tensor]
# Share of rows at one level from which all go through it first, and the others are overwritten.
MAJORITY = {"cpu": 2.0, "cuda": 0.7}  # never on a CPU, where multiplying is dear and moving cheap


@dataclass(frozen=True)
class Groups:
    """Rows of a population by their level of one unit.

    Attributes:
        levels: The levels that occur.
        members: Rows of each, on the device.
        main: Place of the level that most rows have.
        rows: Rows in all.
        cover: Whether all rows go through the main level first.
    """

    levels: list[int]
    members: Sequence[torch.Tensor]
    main: int
    rows: int
    cover: bool


def groups_of(levels: npt.NDArray[np.int64], device: torch.device) -> list[Groups]:
    """Return the groups of several units, for levels of shape (units, rows); one transfer to the device for all.

    Offspring differ from their parent in few units, so nearly all rows of a layer are at one level. On a GPU gathering
    and scattering those costs more than the multiplications that it saves.
    """
    orders = moved(np.argsort(levels, axis=1, kind="stable"), device)
    found = []
    for unit, order in zip(levels, orders, strict=True):
        different, counts = levels_in(unit)
        main = counts.index(max(counts))
        cover = counts[main] >= MAJORITY[device.type] * len(unit)
        members = order.split(counts) if len(different) > 1 else (order,)
        found.append(Groups(different, members, main, len(unit), cover))
    return found


def levels_in(unit: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Return the levels that occur, in order, and how often each does; many times as fast as numpy's ``unique``."""
    counts = np.bincount(unit)
    there = np.flatnonzero(counts)
    return there.tolist(), counts[there].tolist()


def distinct_rows(keys: npt.NDArray[np.int64]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Return where each distinct row of a table occurs first, and for every row the place of its like among those."""
    places: dict[bytes, int] = {}
    first: list[int] = []
    like = np.empty(len(keys), dtype=np.int64)
    for row, key in enumerate(keys):
        like[row] = places.setdefault(key.tobytes(), len(first))
        if like[row] == len(first):
            first.append(row)
    return first, like


def routed(module: nn.Module, groups: Groups, weights: Mapping[int, torch.Tensor]) -> Forward:
    """Return a forward for inputs whose first dimension is the population's rows times the batch.

    Args:
        module: The linear layer.
        groups: Which rows are at which level.
        weights: Weight (out, in) of each level in it.
    """
    bias: Any = module.bias
    main = weights[groups.levels[groups.main]]
    if len(groups.levels) == 1:
        return lambda inputs: functional.linear(inputs, main, bias)
    rest = [
        (weights[level], rows)
        for place, (level, rows) in enumerate(zip(groups.levels, groups.members, strict=True))
        if place != groups.main or not groups.cover
    ]

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        by_row = inputs.view(groups.rows, -1, inputs.shape[-1])
        if groups.cover:
            outputs = functional.linear(by_row, main, bias)
        else:
            outputs = by_row.new_empty((*by_row.shape[:-1], len(main)))
        for weight, rows in rest:
            outputs.index_copy_(0, rows, functional.linear(by_row.index_select(0, rows), weight, bias))
        return outputs.view(*inputs.shape[:-1], -1)

    return forward


def silent_rows(module: nn.Module, gone: npt.NDArray[np.int64], rows: int) -> Forward:
    """Return a forward that says nothing for some rows of the population."""
    forward = module.forward

    def quiet(inputs: torch.Tensor) -> torch.Tensor:
        outputs = forward(inputs)
        return outputs.view(rows, -1).index_fill(0, moved(gone, outputs.device), 0).view(outputs.shape)

    return quiet
