"""What one command starts: its folder and its jobs, and what jobs read of it from the environment."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from evosweep.core.results import RESULT
from evosweep.core.run_record import SEVERAL, several_of

MULTIRUN = "EVOSWEEP_MULTIRUN"  # environment: name of the multirun that a job belongs to
JOBS = "EVOSWEEP_JOBS"  # environment: how many jobs it has
VARIED = "EVOSWEEP_VARIED"  # environment: JSON list of the settings that the multirun varies


@dataclass
class Launch:
    """A command's single job or multirun.

    Attributes:
        config: The command's configuration.
        folder: Of the job, or above the folders of the multirun's jobs.
        multirun: Name of the multirun; None for a single job.
    """

    config: DictConfig
    folder: Path
    multirun: str | None = None

    def jobs(self) -> list[Path]:
        """Return the folders of the jobs that have a result, in the order of their numbers."""
        if self.multirun is None and not several_of(self.folder):
            return [self.folder] if (self.folder / RESULT).is_file() else []
        found = [path.parent for path in self.folder.glob(f"*/{RESULT}")]
        found.sort(key=lambda path: (len(path.name), path.name))
        listed = sorted(self.folder.glob(f"*/{SEVERAL}"), key=lambda path: (len(path.parent.name), path.parent.name))
        found += [path.parent / name for path in listed for name in several_of(path.parent)["budgets"]]
        return [folder for folder in found if (folder / RESULT).is_file()]
