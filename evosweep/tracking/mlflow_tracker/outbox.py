"""Queue of writes to MLflow: retried where the store does not answer, reported at the end if it never does."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from evosweep.core.files import json_safe
from evosweep.core.redact import redact
from evosweep.tracking.behind import one_line
from evosweep.tracking.mlflow_tracker.store import UNREACHABLE

UNSENT = "tracking_unsent.jsonl"
PAUSE = 10.0  # seconds without a try after a store did not answer
LAST = 20.0  # seconds of further tries at the end of a run
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Write:
    """One request to MLflow.

    Attributes:
        send: Makes the request.
        content: What it holds, as JSON, for the file of what could not be sent.
    """

    send: Callable[[MlflowClient], object]
    content: Mapping[str, Any]


class Outbox:
    """Sends writes in order; keeps those that a silent store did not take, and tries again later.

    Args:
        client: Of the store.
    """

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.reason = ""
        self.sent = 0
        self._waiting: deque[Write] = deque()
        self._failed: list[Write] = []
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def put(self, write: Write) -> None:
        """Send a write, and what waits before it, unless the store did not answer a moment ago."""
        self._waiting.append(write)
        if time.monotonic() >= self._quiet_until and self._lock.acquire(blocking=False):
            try:
                self._send_waiting()
            finally:
                self._lock.release()

    def flush(self, seconds: float = LAST) -> bool:
        """Try for at most about ``seconds`` to send everything; return whether nothing is left."""
        deadline = time.monotonic() + seconds
        while self._waiting or self._failed:
            if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
                break
            try:
                again, self._failed = self._failed, []
                self._waiting.extendleft(reversed(again))
                self._send_waiting()
            finally:
                self._lock.release()
            if not self._waiting or time.monotonic() >= deadline:
                break
            time.sleep(min(1.0, max(deadline - time.monotonic(), 0.0)))
        return not (self._waiting or self._failed)

    def left(self) -> list[Write]:
        """Return the writes that were not sent."""
        return [*self._failed, *self._waiting]

    def save(self, folder: Path) -> Path | None:
        """Write what was not sent into a folder, a line a write; return the file, or None if it cannot be written."""
        path = folder / UNSENT
        lines = (json.dumps(json_safe(dict(write.content)), ensure_ascii=False) for write in self.left())
        try:
            path.write_text(redact("".join(f"{line}\n" for line in lines)), encoding="utf-8")
        except OSError:
            return None
        return path

    def _send_waiting(self) -> None:
        while self._waiting:
            write = self._waiting[0]
            try:
                write.send(self.client)
            except Exception as error:
                self.reason = self.reason or one_line(error)
                logger.debug("MLflow did not take a write", exc_info=True)
                if _store_is_away(error):
                    self._quiet_until = time.monotonic() + PAUSE
                    return
                self._failed.append(write)
            else:
                self.sent += 1
            self._waiting.popleft()


def _store_is_away(error: Exception) -> bool:
    """Return whether the next write would fail as well: the store is silent, locked or refuses everything."""
    if isinstance(error, MlflowException) and error.error_code in REFUSED:
        return False
    return isinstance(error, UNREACHABLE)
