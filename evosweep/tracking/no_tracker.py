"""A tracker that records nothing: ``tracking=none``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evosweep.core.events import Event, SearchResult
from evosweep.tracking.base import TextInput


class NoTracker:
    """Tracks nothing; the run's folder still holds its allocation and result."""

    run_id: str | None = None
    link: str | None = None
    database: Path | None = None
    command = ""
    missing = ""
    away = ""
    model = "none"

    def check(self) -> None:
        """Accept every environment."""

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        config: str = "",
        multirun: str | None = None,
        inputs: Sequence[TextInput] = (),
        device: str = "cpu",
        folder: Path | None = None,
        run_id: str | None = None,
        resumed: bool = False,
    ) -> str | None:
        """Return the name; nothing is opened.

        Args:
            name: Of the run.
            params: Not used, as all that follow.
            tags: Not used.
            config: Not used.
            multirun: Not used.
            inputs: Not used.
            device: Not used.
            folder: Not used.
            run_id: Not used.
            resumed: Not used.
        """
        del params, tags, config, multirun, inputs, device, folder, run_id, resumed
        return name

    def on_event(self, event: Event) -> None:
        """Keep nothing."""

    def deliver(self, result: SearchResult, *, report: Path, run: Path, trial: int | None) -> None:
        """Keep nothing.

        Args:
            result: Not used.
            report: Not used.
            run: Not used.
            trial: Not used.
        """

    def exported(self, run_id: str, row: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def close(self, status: str, *, reason: str = "") -> None:
        """End nothing."""

    def summarize(
        self,
        multirun: str,
        *,
        status: str,
        files: Sequence[Path],
        note: str = "",
        best: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        """Keep nothing.

        Args:
            multirun: Not used.
            status: Not used.
            files: Not used.
            note: Not used.
            best: Not used.
            folder: Not used.
        """
