import pytest

from evosweep.search.bisection import Bisection


def solved(gain: float, bound: float, searches: int = 12) -> Bisection:
    """Return a bisection whose searches gain a share over a start whose loss halves with every 100 bits."""
    found = Bisection(bound, least=1000, most=2000, within=0.005)
    found.trace(lambda size: 2.0 ** (-(size - 1000) / 100), 7)
    for _ in range(searches):
        size = found.next()
        if size is None:
            break
        found.searched[size] = gain * 2.0 ** (-(size - 1000) / 100)
    return found


@pytest.mark.parametrize("gain", [0.6, 0.95, 1.0, 1.2])
def test_the_smallest_size_that_holds_is_found(gain: float) -> None:
    found = solved(gain, bound=0.1)
    held = found.held
    assert held is not None and found.next() is None
    assert gain * 2.0 ** (-(held - 1000) / 100) <= 0.1
    assert gain * 2.0 ** (-(held * 0.99 - 1000) / 100) > 0.1  # a size one hundredth below does not hold
    assert len(found.searched) <= 4


def test_the_least_size_is_the_answer_where_it_holds() -> None:
    found = solved(1.0, bound=5.0)
    assert found.held == 1000 and len(found.searched) == 1


def test_sizes_rise_while_none_holds() -> None:
    found = Bisection(0.1, least=1000, most=2000, within=0.005)
    found.trace(lambda size: 0.2 if size < 1500 else 0.05, 6)
    sizes = []
    while (size := found.next()) is not None:
        sizes.append(size)
        found.searched[size] = 0.3
    assert sizes == sorted(set(sizes)) and sizes[-1] == 2000 and found.held is None
