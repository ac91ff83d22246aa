"""Groups the rows of a population by level, and finds equal rows, for a whole block at once."""

import numpy as np
import numpy.typing as npt
import torch

from evosweep.models.device import moved
from evosweep.models.slots import RowGroups

# Share of rows at one level from which on all rows are multiplied with its weight, and the others overwritten.
MAJORITY = {"cpu": 2.0, "cuda": 0.7}  # never on a CPU, where multiplications cost much and copies little


def groups_of(levels: npt.NDArray[np.int64], device: torch.device, *, majority: float | None = None) -> list[RowGroups]:
    """Return the rows of a population grouped by level, for each of several units, with one transfer to the device.

    Offspring differ from their parent in few units, so nearly all rows of a layer have the same level. On a GPU,
    gathering and scattering those rows costs more than the multiplications that it saves.

    Args:
        levels: Level of each row, shape (units, rows).
        device: Where the row indices are needed.
        majority: Share of rows at one level from which on all are multiplied with its weight; None: by device.
    """
    share = MAJORITY[device.type] if majority is None else majority
    orders = moved(np.argsort(levels, axis=1, kind="stable"), device)
    found = []
    for unit, order in zip(levels, orders, strict=True):
        different, counts = levels_in(unit)
        main = counts.index(max(counts))
        cover = counts[main] >= share * len(unit)
        members = order.split(counts) if len(different) > 1 else (order,)
        found.append(RowGroups(different, members, main, len(unit), cover))
    return found


def levels_in(unit: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Return the levels that occur in one unit's row, ascending, and how often each does.

    The same as ``numpy.unique`` with counts, many times as fast on short rows of small integers.
    """
    counts = np.bincount(unit)
    occurring = np.flatnonzero(counts)
    return occurring.tolist(), counts[occurring].tolist()


def distinct_rows(keys: npt.NDArray[np.int64]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Return the distinct rows of a table by where each occurs first, and which of them every row is.

    Args:
        keys: Shape (rows, columns).

    Returns:
        ``first``, indices of the distinct rows, and ``which`` of shape (rows,), so that
        ``keys[first][which]`` is ``keys``.
    """
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    which = np.empty(len(keys), dtype=np.int64)
    for row, key in enumerate(keys):
        which[row] = numbers.setdefault(key.tobytes(), len(first))
        if which[row] == len(first):
            first.append(row)
    return first, which
