from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from evosweep.evaluate import level_weights as module
from evosweep.evaluate.level_weights import LevelWeights
from evosweep.evaluate.memory import MemoryPlan


def plan(packed: str, dense: float = 0.0) -> MemoryPlan:
    return MemoryPlan(dense=dense, packed=packed, activations=1e9, targets=1e9)


def made(store, packed: str, dense: float = 0.0) -> LevelWeights:
    return LevelWeights(store, device=torch.device("cpu"), dtype=torch.float32, plan=plan(packed, dense))


@pytest.mark.parametrize("packed", ["nowhere", "device", "disk"])
def test_wherever_levels_wait_they_are_the_stores(store, packed: str) -> None:
    levels = made(store, packed)
    for place, unit in enumerate(store.units):
        for level in range(len(unit.levels)):
            expected = store.weight(unit.name, unit.levels[level].name)
            assert torch.equal(levels.weight((place, level)), expected)


def test_dense_weights_are_kept_while_they_fit(store) -> None:
    levels = made(store, "nowhere", dense=1e9)
    assert levels.weight((0, 1)) is levels.weight((0, 1))
    assert made(store, "nowhere").weight((0, 1)) is not made(store, "nowhere").weight((0, 1))


def test_the_next_blocks_levels_come_while_a_block_runs(store, monkeypatch) -> None:
    """Streams of a GPU, played: what was prefetched is used, once, and nothing is fetched twice."""
    waits: list[str] = []

    @contextmanager
    def stream(_side):
        yield

    side = SimpleNamespace(record_event=lambda: "arrived")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(wait_event=waits.append))
    monkeypatch.setattr(module, "page_locked", lambda tensor, owner: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    moves: list[object] = []
    plain = module._moved
    monkeypatch.setattr(module, "_moved", lambda parts, device: moves.append(parts) or plain(parts, device))
    levels = made(store, "host")
    levels._side = side
    blocks = [[(place, 0), (place, 1)] for place in range(4)]
    for block, keys in enumerate(blocks):
        if block + 1 < len(blocks):
            levels.prefetch(blocks[block + 1])
        for place, level in keys:
            unit = store.units[place]
            assert torch.equal(levels.weight((place, level)), store.weight(unit.name, unit.levels[level].name))
    assert len(waits) == 6 and len(moves) == 8  # the first block's two come unannounced
    assert not levels._coming
    levels.prefetch(blocks[0])
    levels.prefetch(blocks[1])
    levels.prefetch(blocks[2])
    assert set(levels._coming) == {*blocks[1], *blocks[2]}  # the first was never asked for
