"""No tracking."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evosweep.core.events import Event, SearchResult


class NoTracker:
    """Tracks nothing; the run's folder still holds its allocation and result."""

    run_id = None
    link = None
    database = None
    model = "none"

    def start(self, name: str, **_: Any) -> str:
        """Open nothing."""
        return name

    def dataset(self, **_: Any) -> None:
        """Make nothing."""

    def on_event(self, event: Event) -> None:
        """Hear nothing."""

    def deliver(self, result: SearchResult, *, report: Path, run: Path, trial: int | None) -> None:
        """Log nothing."""

    def close(self, status: str, *, reason: str = "") -> None:
        """Close nothing."""

    def summarize(self, multirun: str, *, status: str, files: Sequence[Path], note: str = "") -> None:
        """Close nothing."""
