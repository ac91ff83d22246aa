"""Queue of writes to MLflow: delivered by a thread of its own, kept on disk while the store does not take them."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from evosweep.tracking.behind import one_line
from evosweep.tracking.mlflow_tracker.delivery import Delivery, store_is_away
from evosweep.tracking.mlflow_tracker.spool import OPEN, Spool, Write

PAUSE = 3.0  # seconds without a try after a store did not answer
SOON = 1.0  # the same at the end of a run
LAST = 5.0  # seconds without a delivery, at the end of a run, after which the store is given up
MOST = 60.0  # seconds of deliveries at the end of a run
UPLOAD = 1800.0  # seconds that one upload of a model may take then: every request of it has its own time limit
MODEL = "model"  # kind of the write that is such an upload
logger = logging.getLogger(__name__)


class Outbox:
    """Delivers writes in order in another thread; nobody waits for it but ``settle`` and ``flush``.

    Args:
        delivery: To the store.
        folder: Of the run; what the store has not taken is kept there.
        patient: Whether a run that cannot be opened is tried again later, as with a server.
        quiet: Seconds before the first try, where the store is known not to answer.
        guard: Makes the context in which the run is opened: one that keeps other processes out.
    """

    def __init__(
        self,
        delivery: Delivery,
        *,
        folder: Path | None = None,
        patient: bool = True,
        quiet: float = 0.0,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.delivery = delivery
        self.spool = Spool(folder)
        self.spool.replace([])  # of a run that goes on: its search repeats what it logged
        self.reason = ""
        self.refused: Exception | None = None
        self.sent = 0
        self._patient = patient
        self._guard = guard
        self._waiting: deque[Write] = deque()
        self._failed: list[Write] = []
        self._changed = threading.Condition()
        self._pause = PAUSE
        self._quiet_until = time.monotonic() + quiet if quiet else 0.0
        self._last_answer = time.monotonic()
        self._on_disk = False
        self._over = False
        self._sending: str | None = None  # kind of the write that is under way
        self._thread: threading.Thread | None = None

    def put(self, write: Write) -> None:
        """Queue a write; one that waits behind others on disk is added to them."""
        with self._changed:
            self._waiting.append(write)
            if self._on_disk:
                self.spool.append([write])
            elif self._away():
                self._keep()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self, seconds: float) -> None:
        """Wait until everything is delivered, or the store does not answer, or ``seconds`` are over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._away() or self.refused is not None, seconds)

    def flush(self, seconds: float = LAST, *, uploads: bool = True) -> bool:
        """Deliver what is left while the store takes something every ``seconds``; return whether nothing is left.

        Args:
            seconds: Without a delivery, after which the store is given up.
            uploads: Whether a model that is being uploaded may take longer.
        """
        began = time.monotonic()
        with self._changed:
            self._waiting.extendleft(reversed(self._failed))
            self._failed = []
            self._pause = SOON
            self._quiet_until = 0.0
            self._last_answer = began
            self._changed.notify_all()
            while self._waiting and self.refused is None:
                now = time.monotonic()
                if uploads and self._sending == MODEL:
                    left = began + UPLOAD - now
                else:
                    left = min(self._last_answer + seconds, began + max(seconds, MOST)) - now
                if left <= 0:
                    break
                self._changed.wait(left)
            return not (self._waiting or self._failed)

    def end(self) -> Path | None:
        """Stop delivering; return the file of what was not delivered, None if there is nothing or no file."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            return self.spool.replace(self.left())

    def left(self) -> list[Write]:
        """Return the writes that were not delivered, with the id of their run where it is known."""
        return [
            write if write.kind == OPEN else replace(write, run=self.delivery.run_of(write))
            for write in (*self._failed, *self._waiting)
        ]

    def missing(self, store: str, path: Path | None) -> str:
        """Return in one line what was not delivered, and the command that delivers it.

        Args:
            store: Address of MLflow, without credentials.
            path: File of what is left; None where there is none.
        """
        left = len(self.left())
        known = next((write.run for write in self.left() if write.run), None)
        run = f"run {known}, which may be shown as running" if known else "the run, which it does not know"
        reason = self.reason or "no answer in time"
        line = f"MLflow ({store}) did not take {left} of {left + self.sent} writes of {run}: {reason}"
        return line if path is None else f"{line}; they are in {path}; to deliver them: evosweep sync {path.parent}"

    def _away(self) -> bool:
        return time.monotonic() < self._quiet_until

    def _keep(self) -> None:
        """Write to disk what waits."""
        self.spool.replace(self.left())
        self._on_disk = True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._over and (not self._waiting or self._away() or self.refused is not None):
                    idle = not self._waiting or self.refused is not None
                    self._changed.wait(None if idle else max(self._quiet_until - time.monotonic(), 0.0))
                if self._over:
                    return
                write = self._waiting[0]
                self._sending = write.kind
            failure = self._try(write)
            with self._changed:
                self._sending = None
                if self._over:
                    return
                self._note(write, failure)
                self._changed.notify_all()

    def _try(self, write: Write) -> Exception | None:
        try:
            with self._guard() if write.kind == OPEN else nullcontext():
                self.delivery.send(write)
        except Exception as error:
            logger.debug("MLflow did not take a write", exc_info=True)
            return error
        return None

    def _note(self, write: Write, failure: Exception | None) -> None:
        """Take a delivered write from the queue, or keep one that was not delivered."""
        if failure is None:
            self.sent += 1
            self._last_answer = time.monotonic()
            self._waiting.popleft()
            if self._on_disk and not self._waiting:
                self.spool.replace(self._failed)
                self._on_disk = False
            return
        self.reason = self.reason or one_line(failure)
        away = store_is_away(failure)
        if write.kind == OPEN and not (away and self._patient):
            self.refused = failure
        elif away:
            self._quiet_until = time.monotonic() + self._pause
            self._keep()
        else:
            self._failed.append(self._waiting.popleft())
