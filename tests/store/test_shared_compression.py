"""Layers of a block are shared out evenly among processes."""

from types import SimpleNamespace

import pytest

from evosweep.store.shared_compression import shared_out


def group(*shapes: tuple[int, int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(shape=shape) for shape in shapes]


SMOLLM2 = [
    group((576, 576), (192, 576), (192, 576)),
    group((576, 576)),
    group((1536, 576), (1536, 576)),
    group((576, 1536)),
]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_group_is_compressed_once(processes: int) -> None:
    found = shared_out(SMOLLM2, processes=processes)
    assert len(found) == processes
    assert sorted(SMOLLM2.index(one) for groups in found for one in groups) == [0, 1, 2, 3]


def test_the_largest_group_stands_against_the_others() -> None:
    down, rest = shared_out(SMOLLM2, processes=2)
    assert down == [SMOLLM2[3]] and len(rest) == 3
