"""Further linear bounds of a problem beside its size: memory of a device, milliseconds of kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int64]
Genome = npt.NDArray[np.int64]
STEPS = 60  # bisections of a price


@dataclass(frozen=True)
class Limit:
    """A bound on the sum of what each unit's level takes of something.

    Attributes:
        name: The setting that gives it, as ``device_megabytes``.
        amounts: What every level of every unit takes, in whole parts.
        most: Parts that an allocation may take.
        parts: Parts in one of what users count in: bits in a megabyte, nanoseconds in a millisecond.
        fixed: Parts that are taken whatever the allocation is.
    """

    name: str
    amounts: tuple[tuple[int, ...], ...]
    most: int
    parts: float
    fixed: int = 0

    @cached_property
    def table(self) -> Table:
        """What every (unit, level) takes, shape (units, longest ladder); past a ladder's end, 0."""
        table = np.zeros((len(self.amounts), max(map(len, self.amounts))), dtype=np.int64)
        for row, amounts in enumerate(self.amounts):
            table[row, : len(amounts)] = amounts
        return table

    @property
    def least(self) -> int:
        """Fewest parts that any allocation takes, whatever its size."""
        return sum(min(amounts) for amounts in self.amounts)

    @property
    def largest(self) -> int:
        """Most parts that any allocation takes."""
        return sum(max(amounts) for amounts in self.amounts)

    def used(self, genome: Genome) -> int:
        """Return the parts that a genome takes, shape (units,)."""
        return int(self.table[np.arange(len(genome)), genome].sum())

    def shown(self, parts: int) -> float:
        """Return parts as users count, what is fixed included."""
        return (parts + self.fixed) / self.parts


def within_limits(costs: Table, budget: int, limits: Sequence[Limit]) -> Genome | None:
    """Return a genome that holds the budget and all limits, None where none was found.

    Every level is priced by what it takes of each bound, as a share of the bound; the price of whatever is exceeded
    rises until nothing is.

    Args:
        costs: Bits of every level, shape (units, longest ladder); past a ladder's end, -1.
        budget: In bits.
        limits: Further bounds.
    """
    tables = np.stack([np.maximum(costs, 0), *(limit.table for limit in limits)])
    bounds = np.array([budget, *(limit.most for limit in limits)])
    shares = tables / np.maximum(bounds, 1)[:, None, None]
    shares[:, costs < 0] = np.inf
    prices = np.ones(len(bounds)) / len(bounds)
    for _ in range(STEPS):
        genome = np.einsum("k,kul->ul", prices, shares).argmin(axis=1)
        taken = tables[:, np.arange(len(genome)), genome].sum(axis=1)
        if (taken <= bounds).all():
            return np.asarray(genome, dtype=np.int64)
        prices *= np.clip(taken / np.maximum(bounds, 1), 0.5, 2.0)
        prices /= prices.sum()
    return None


def least_within_budget(costs: Table, budget: int, limit: Limit) -> int:
    """Return about the fewest parts of a limit that a genome within the budget takes, by bisection of a price.

    Args:
        costs: Bits of every level, shape (units, longest ladder); past a ladder's end, -1.
        budget: In bits, enough for the cheapest genome.
        limit: Whose parts.
    """
    rows = np.arange(len(costs))
    priced = np.where(costs < 0, np.inf, costs)
    low = 0.0
    high = 1.0 + float(limit.largest)
    best = limit.used(np.zeros(len(costs), dtype=np.int64))
    for trial in (low, *[None] * STEPS):
        price = (low + high) / 2 if trial is None else trial
        genome = (limit.table + price * priced if price else np.where(costs < 0, np.inf, limit.table)).argmin(axis=1)
        if int(costs[rows, genome].sum()) > budget:
            low = price
            continue
        high = price
        best = min(best, limit.used(genome))
    return best
