"""Progress of a run: in the terminal, each line with its job's number, and in the run's ``run.log``."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from evosweep.core.events import Progress
from evosweep.core.redact import redact

T = TypeVar("T")


class JobProgress:
    """Shows the progress of the current job, and writes every line to the job's log file too.

    Args:
        inner: Shows it.
    """

    def __init__(self, inner: Progress) -> None:
        self.inner = inner
        self._prefix = ""
        self._log: Path | None = None

    def begin(self, *, prefix: str, log: Path, first: str) -> None:
        """Start a job: its prefix and log file are used from here on.

        Args:
            prefix: Before every line, as ``[job 3/6] ``.
            log: File that lines are added to.
            first: Its first line; not shown.
        """
        self._prefix = prefix
        self._log = log
        self._write(first)

    def track(self, items: Sequence[T], *, description: str, tokens: int | None = None) -> Iterable[T]:
        """Yield ``items`` while showing progress and time left.

        Args:
            items: What is worked through.
            description: Shown beside the bar, and logged.
            tokens: Tokens that end the phase, if those do and not the items.
        """
        self._write(description)
        return self.inner.track(items, description=f"{self._prefix}{description}", tokens=tokens)

    def say(self, text: str) -> None:
        """Show one line."""
        self._write(text)
        self.inner.say(f"{self._prefix}{redact(text)}")

    def note(self, values: Mapping[str, str], *, tokens: int | None = None) -> None:
        """Show figures of the item of ``track`` that is done."""
        self._write(", ".join(f"{key} {value}" for key, value in values.items()))
        self.inner.note(values, tokens=tokens)

    def _write(self, text: str) -> None:
        if self._log is not None and self._log.parent.is_dir():
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {redact(text)}\n")
