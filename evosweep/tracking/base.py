"""The contract of trackers, which record runs: MLflow, or nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Event, SearchResult


class TrackingError(EvosweepError):
    """Raised where the result is complete, but a run or study could not be recorded as a whole."""


@dataclass(frozen=True)
class TextInput:
    """A split of the text that a run used.

    Attributes:
        name: Shown to users.
        digest: Content hash.
        source: The settings that the text came from, as YAML.
        context: What the split was for: ``calibration``, ``search`` or ``validation``.
        tokens: Number of tokens in it.
    """

    name: str
    digest: str
    source: str
    context: str
    tokens: int


class Tracker(Protocol):
    """Listener that records a search. Only ``check`` and ``start`` may raise."""

    model: str

    @property
    def run_id(self) -> str | None:
        """Identifier of the run; None before ``start``."""

    @property
    def link(self) -> str | None:
        """Address at which a browser shows the experiment; None before ``start``."""

    @property
    def command(self) -> str:
        """Command that serves ``link``; empty where a server runs already."""

    @property
    def database(self) -> Path | None:
        """Database file that the runs are kept in, if that is a file."""

    @property
    def missing(self) -> str:
        """One line about what could not be written; empty if nothing is missing."""

    @property
    def away(self) -> str:
        """One line about a server that did not answer ``check``; empty if runs can be recorded."""

    def check(self) -> None:
        """Raise SettingError where runs cannot be kept; creates what the first run needs."""

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
        """Open a run; return its identifier, None where it is not known yet.

        Args:
            name: Shown to users.
            params: What was chosen.
            tags: What else is known.
            config: The whole configuration as YAML.
            multirun: Name of the multirun that this run is a job of.
            inputs: Texts that were used.
            device: Type of the device that computes, ``cpu`` or ``cuda``.
            folder: The run's folder; what cannot be tracked is written there.
            run_id: A run to go on with, whose recorded generations are not recorded again; one that is no longer there
                is opened anew.
            resumed: Whether the run goes on, be its identifier known or not.
        """

    def on_event(self, event: Event) -> None:
        """Record an event."""

    def deliver(self, result: SearchResult, *, report: Path, run: Path, trial: int | None) -> None:
        """Record a search's report and, if asked for, its exported model.

        Args:
            result: Of the search.
            report: Folder of figures.
            run: The run's folder: ``allocation.json``, ``config.yaml``, and ``model/`` if the winner was exported.
            trial: Number of the winner's trial in the study.
        """

    def exported(self, run_id: str, row: Mapping[str, Any]) -> None:
        """Record an export made after a run's end; ``row`` is the run's result with the new ``export`` in it."""

    def close(self, status: str, *, reason: str = "") -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""

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
        """Record a multirun's comparison, and end its parent run.

        Args:
            multirun: Its name.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            files: Its comparison as tables and figures.
            note: Its comparison in Markdown.
            best: Run ids or folders of the jobs that were named best, the best of them first.
            folder: Of the multirun; what cannot be recorded is kept there.
        """
