"""Keeps ``allocation.json`` in a run's folder at the best allocation so far."""

from pathlib import Path

from evosweep.core.events import Event, GenerationRecord
from evosweep.core.problem import Problem

ALLOCATION = "allocation.json"


class AllocationFile:
    """Listener that keeps ``allocation.json`` in the run's folder at the best allocation so far.

    Args:
        folder: Of the run.
        problem: Units and their levels.
    """

    missing = ""

    def __init__(self, folder: Path, problem: Problem) -> None:
        self.folder = folder
        self.problem = problem

    def on_event(self, event: Event) -> None:
        """Write the elite whenever it changes, and the winner in the end."""
        if isinstance(event, GenerationRecord) and (event.changed or event.generation == 0):
            facts = {"generation": event.generation, "bits_per_weight": event.bits_per_weight, **event.validation}
            self.problem.save(event.elite, self.folder / ALLOCATION, **facts)

    def wait(self, timeout: float | None = None) -> bool:
        """Return at once: everything is written as it happens."""
        del timeout
        return True
