"""The smallest size whose loss is within a bound: bisection, guided by the losses of allocations without a search."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Bisection:
    """Sizes that were searched and their losses, and the size to search next.

    Attributes:
        bound: Largest loss that holds.
        least: Smallest size, in bits.
        most: Largest size.
        within: How close below the smallest size that holds one that fails must be, as a share of it.
        curve: Loss of the start of a search by size: what sizes are guessed by.
        searched: Loss of each winner by size.
    """

    bound: float
    least: int
    most: int
    within: float
    curve: dict[int, float] = field(default_factory=dict)
    searched: dict[int, float] = field(default_factory=dict)

    def trace(self, start: Callable[[int], float], steps: int) -> None:
        """Fill the curve by bisection between the least and the most size, ``steps`` times."""
        low = self.least
        high = self.most
        for size in (low, high):
            self.curve[size] = start(size)
        for _ in range(steps):
            middle = (low + high) // 2
            if middle in self.curve:
                return
            self.curve[middle] = start(middle)
            if self.curve[middle] <= self.bound:
                high = middle
            else:
                low = middle

    @property
    def held(self) -> int | None:
        """Smallest size whose winner is within the bound; None while there is none."""
        return min((size for size, loss in self.searched.items() if loss <= self.bound), default=None)

    @property
    def failed(self) -> int:
        """Largest size below ``held`` whose winner is not within the bound; below the least size if there is none."""
        held = self.most + 1 if self.held is None else self.held
        sizes = (size for size, loss in self.searched.items() if loss > self.bound and size < held)
        return max(sizes, default=self.least - 1)

    def next(self) -> int | None:
        """Return the size to search next; None where the smallest is known closely enough.

        The start's curve, scaled by what the nearest search gained, says where the bound should hold. What is tried is
        that size, or the one that would end the bisection if it failed, whichever is smaller.
        """
        if not self.searched:
            return self._size(self.bound)
        held = self.held
        failed = self.failed
        if held is not None and (held - failed <= self.within * held or held == self.least):
            return None
        nearest = failed if held is None else held
        gain = self.searched.get(nearest, self.bound) / max(self._loss(nearest), 1e-12)
        guess = self._size(self.bound / max(gain, 1e-12))
        if held is None:
            return min(max(guess, math.ceil(failed * (1 + 2 * self.within))), self.most) if failed < self.most else None
        below = max(held - int(self.within * held), failed + 1, self.least)  # if that fails, the search is over
        return max(min(guess, below), failed + 1, self.least)

    def _size(self, loss: float) -> int:
        """Return where the curve has a loss."""
        sizes = sorted(self.curve)
        logs = np.minimum.accumulate([math.log(max(self.curve[size], 1e-12)) for size in sizes])
        found = np.interp(-math.log(max(loss, 1e-12)), -logs, sizes)
        return min(max(math.ceil(found), self.least), self.most)

    def _loss(self, size: int) -> float:
        """Return the curve's loss at a size."""
        sizes = sorted(self.curve)
        logs = [math.log(max(self.curve[known], 1e-12)) for known in sizes]
        return math.exp(float(np.interp(size, sizes, logs)))
