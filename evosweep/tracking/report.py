"""What a search leaves to look at: figures and tables in the run's folder, whatever tracks it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from evosweep.core.events import SearchResult

Artifact = Callable[[SearchResult, Path], None]
FOLDER = "report"


class Report:
    """Makes files of a result.

    Args:
        artifacts: Each writes what it has to say of a result into a folder; nothing, if that is nothing.
    """

    def __init__(self, *, artifacts: Sequence[Artifact] = ()) -> None:
        self.artifacts = tuple(artifacts)

    def write(self, result: SearchResult, folder: Path) -> Path:
        """Write all of them into ``report/`` in a run's folder, and return it."""
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        for make in self.artifacts:
            make(result, target)
        return target
