"""A cache bounded by bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteLRU(Generic[V]):
    """Keeps the values used last, as many as fit.

    Args:
        limit: Most bytes kept; a single larger value is returned but not kept.
        size: Bytes of a value.
    """

    def __init__(self, *, limit: float, size: Callable[[V], int]) -> None:
        self.limit = limit
        self.size = size
        self.used = 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of ``key``, made if it is not here."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        bytes_of = self.size(value)
        if bytes_of <= self.limit:
            self._values[key] = value
            self.used += bytes_of
            while self.used > self.limit:
                _, dropped = self._values.popitem(last=False)
                self.used -= self.size(dropped)
        return value
