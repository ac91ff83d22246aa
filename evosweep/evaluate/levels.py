"""The levels of all units as weights on the model's device, from wherever they wait."""

from collections.abc import Iterable, Mapping

import torch

from evosweep.core.lru import ByteLRU
from evosweep.evaluate.memory import MemoryPlan
from evosweep.store.manifest import LevelStore

Key = tuple[int, int]
Parts = Mapping[str, torch.Tensor]


class Levels:
    """Weights by (unit's place, level).

    Args:
        store: Where they come from.
        device: Where they are wanted.
        dtype: The model's type.
        plan: What may be kept where.
    """

    def __init__(self, store: LevelStore, *, device: torch.device, dtype: torch.dtype, plan: MemoryPlan) -> None:
        self.store, self.device, self.dtype, self.plan = store, device, dtype, plan
        self._dense: ByteLRU[torch.Tensor] = ByteLRU(limit=plan.dense, size=bytes_of)
        self._packed: dict[Key, Parts] = {}  # on the device or page-locked, as the plan says
        self._coming: dict[Key, tuple[Parts, torch.cuda.Event]] = {}
        self._awaited: set[Key] = set()  # what the block that runs now may still ask for
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def weight(self, key: Key) -> torch.Tensor:
        """Return the dequantized weight (out, in) of a level."""
        return self._dense.get(key, lambda: self._make(key))

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Start bringing page-locked levels of the next block to the device, while the block before it runs.

        What two calls ago was brought and never asked for is let go.
        """
        if self.plan.packed != "host" or self._side is None:
            return
        wanted = {key for key in keys if key not in self._dense}
        self._coming = {key: there for key, there in self._coming.items() if key in wanted | self._awaited}
        self._awaited = wanted
        with torch.cuda.stream(self._side):
            for key in sorted(wanted):
                if key not in self._coming:
                    there = _moved(self._waiting(key), self.device)
                    self._coming[key] = there, self._side.record_event()

    def _make(self, key: Key) -> torch.Tensor:
        stored = self.store.payload(*self._names(key))
        return stored.assemble(self._here(key)).weight.to(self.dtype)

    def _here(self, key: Key) -> Parts:
        if key not in self._coming:
            return _moved(self._waiting(key), self.device)
        parts, arrived = self._coming.pop(key)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        for part in parts.values():
            part.record_stream(current)  # made on the other stream: its memory must outlive what this one does
        return parts

    def _waiting(self, key: Key) -> Parts:
        if self.plan.packed not in {"device", "host"}:
            return self.store.payload(*self._names(key)).tensors()
        if key not in self._packed:
            parts = self.store.payload(*self._names(key)).tensors()
            on_device = self.plan.packed == "device"
            self._packed[key] = (
                _moved(parts, self.device) if on_device else {name: part.pin_memory() for name, part in parts.items()}
            )
        return self._packed[key]

    def _names(self, key: Key) -> tuple[str, str]:
        unit = self.store.units[key[0]]
        return unit.name, unit.levels[key[1]].name


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _moved(parts: Parts, device: torch.device) -> Parts:
    return {name: part.to(device, non_blocking=True) for name, part in parts.items()}
