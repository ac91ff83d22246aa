"""Dequantized weights of all levels on the model's device, decoded from packed levels on disk, host or device."""

from collections.abc import Iterable, Mapping

import torch

from evosweep.core.lru import ByteLRU
from evosweep.evaluate.memory import MemoryPlan
from evosweep.models.device import page_locked
from evosweep.store.manifest import LevelStore

Key = tuple[int, int]
Tensors = Mapping[str, torch.Tensor]


class LevelWeights:
    """Dequantized weights by (unit, level), both indices.

    Args:
        store: Has the packed levels.
        device: The model's device.
        dtype: The model's type.
        plan: How much may be kept where.
    """

    def __init__(self, store: LevelStore, *, device: torch.device, dtype: torch.dtype, plan: MemoryPlan) -> None:
        self.store = store
        self.device = device
        self.dtype = dtype
        self.plan = plan
        self._dense: ByteLRU[torch.Tensor] = ByteLRU(limit=plan.dense, size=bytes_of)
        self._packed: dict[Key, Tensors] = {}  # on the device or page-locked, as the plan says
        self._coming: dict[Key, tuple[Tensors, torch.cuda.Event]] = {}
        self._awaited: set[Key] = set()  # keys of the call before: the running block may still use them
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def weight(self, key: Key) -> torch.Tensor:
        """Return the dequantized weight (out, in) of a level, given as (unit, level)."""
        return self._dense.get(key, lambda: self._make(key))

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Start copying levels of the next block from page-locked memory to the device, while a block runs.

        Levels that were copied two calls ago and not used since are freed.
        """
        if self.plan.packed != "host" or self._side is None:
            return
        wanted = {key for key in keys if key not in self._dense}
        self._coming = {key: copy for key, copy in self._coming.items() if key in wanted | self._awaited}
        self._awaited = wanted
        with torch.cuda.stream(self._side):
            for key in sorted(wanted):
                if key not in self._coming:
                    copied = _moved(self._packed_tensors(key), self.device)
                    self._coming[key] = copied, self._side.record_event()

    def _make(self, key: Key) -> torch.Tensor:
        stored = self.store.payload(*self._names(key))
        return stored.assemble(self._on_device(key)).weight.to(self.dtype)

    def _on_device(self, key: Key) -> Tensors:
        if key not in self._coming:
            return _moved(self._packed_tensors(key), self.device)
        tensors, arrived = self._coming.pop(key)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        for tensor in tensors.values():
            tensor.record_stream(current)  # made on the other stream: its memory must outlive what this one does
        return tensors

    def _packed_tensors(self, key: Key) -> Tensors:
        if self.plan.packed not in {"device", "host"}:
            return self.store.payload(*self._names(key)).tensors()
        if key not in self._packed:
            tensors = self.store.payload(*self._names(key)).tensors()
            if self.plan.packed == "device":
                self._packed[key] = _moved(tensors, self.device)
            else:
                self._packed[key] = {name: page_locked(tensor, owner=self) for name, tensor in tensors.items()}
        return self._packed[key]

    def _names(self, key: Key) -> tuple[str, str]:
        unit = self.store.units[key[0]]
        return unit.name, unit.levels[key[1]].name


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
