"""Listeners that write while the search goes on."""

import queue
import threading

from evosweep.core.events import Event, Listener

MOST_WAITING = 64  # events; a listener slower than the search then slows it down, instead of filling memory


class Behind:
    """Hands events to a listener in a thread of its own, in their order.

    Args:
        listener: Hears them, some time after they happened.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._events: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def on_event(self, event: Event) -> None:
        """Take note of an event; what went wrong with an earlier one is raised here."""
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._events.put(event)

    def wait(self) -> None:
        """Return when the listener has heard everything, and end the thread; raise what went wrong."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
            self._thread = None
        self._raise()

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                if self._failure is None:
                    self.listener.on_event(event)
            except BaseException as error:  # raised where the search is
                self._failure = error

    def _raise(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
