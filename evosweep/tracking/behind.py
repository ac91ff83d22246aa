"""Runs a listener in a thread of its own, so that the search does not wait for a disk or a server."""

import logging
import queue
import threading

from evosweep.core.events import Event, Listener
from evosweep.core.redact import redact

logger = logging.getLogger(__name__)


class Behind:
    """Hands events to a listener in another thread, in their order.

    A listener that fails does not stop the search: it gets no further events, and ``missing`` says what went wrong. The
    queue has no limit: a search keeps its records in memory anyway.

    Args:
        listener: Receives the events, some time after they happened.
        name: What the listener writes, for ``missing``.
    """

    def __init__(self, listener: Listener, *, name: str = "") -> None:
        self.listener = listener
        self.name = name or type(listener).__name__
        self.missing = ""
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def on_event(self, event: Event) -> None:
        """Queue an event."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._events.put(event)

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether the listener has received everything, after at most ``timeout`` seconds; end the thread."""
        if self._thread is None:
            return True
        self._events.put(None)
        self._thread.join(timeout)
        done = not self._thread.is_alive()
        if done:
            self._thread = None
            self.missing = self.missing or getattr(self.listener, "missing", "")
        elif not self.missing:
            self.missing = f"{self.name}: still not written after {timeout:g} s"
        return done

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            if self.missing:
                continue
            try:
                self.listener.on_event(event)
            except Exception as error:
                logger.debug("%s failed", self.name, exc_info=True)
                self.missing = f"{self.name} is incomplete: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """Return an error in one line, without credentials."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = getattr(error, "strerror", None) or (lines[0] if lines else "")
    where = getattr(error, "filename", None)
    known = f"{text}: {where}" if where else text
    return str(redact(f"{type(error).__name__}: {known}" if known else type(error).__name__))[:300]
