import threading
import time

from evosweep.core.events import Event
from evosweep.tracking.behind import Behind, one_line


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


def test_a_listener_that_fails_does_not_stop_the_search_and_is_reported() -> None:
    slow = Slow(fail_at=1)
    behind = Behind(slow, name="the study")
    for event in range(50):
        behind.on_event(event)
    assert behind.wait()
    assert slow.heard == [0]
    assert behind.missing == "the study is incomplete: OSError: disk full"


def test_waiting_for_a_listener_that_hangs_ends() -> None:
    class Hanging:
        def on_event(self, event: Event) -> None:
            time.sleep(5)

    behind = Behind(Hanging(), name="MLflow")
    behind.on_event(0)
    began = time.monotonic()
    assert not behind.wait(0.1)
    assert time.monotonic() - began < 2 and behind.missing == "MLflow: still not written after 0.1 s"


def test_errors_are_one_line_without_credentials() -> None:
    text = one_line(ValueError("\nno answer from http://me:secret@host/api\nmore"))
    assert text == "ValueError: no answer from http://me:***@host/api"
    assert one_line(OSError(28, "No space left on device", "x.db")) == "OSError: No space left on device: x.db"
