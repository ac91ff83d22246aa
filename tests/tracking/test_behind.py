import threading
import time

import pytest

from evosweep.core.events import Event
from evosweep.tracking.behind import Behind


class Slow:
    def __init__(self, *, fail_at: object = None) -> None:
        self.heard: list[object] = []
        self.threads: set[int] = set()
        self.fail_at = fail_at

    def on_event(self, event: Event) -> None:
        time.sleep(0.01)
        self.threads.add(threading.get_ident())
        if event == self.fail_at:
            raise OSError("disk full")
        self.heard.append(event)


def test_everything_is_heard_in_order_and_elsewhere() -> None:
    slow = Slow()
    behind = Behind(slow)
    for event in range(100):  # more than may wait
        behind.on_event(event)
    behind.wait()
    behind.on_event(100)  # it can be woken again
    behind.wait()
    assert behind._thread is None
    assert slow.heard == list(range(101)) and slow.threads and threading.get_ident() not in slow.threads


def test_what_goes_wrong_is_raised_where_the_search_is() -> None:
    behind = Behind(Slow(fail_at=0))
    behind.on_event(0)
    with pytest.raises(OSError, match="disk full"):
        for event in range(1, 50):
            time.sleep(0.01)
            behind.on_event(event)


def test_it_is_raised_at_the_end_at_the_latest() -> None:
    behind = Behind(Slow(fail_at=1))
    behind.on_event(0)
    behind.on_event(1)
    with pytest.raises(OSError, match="disk full"):
        behind.wait()
    behind.wait()  # and only once
