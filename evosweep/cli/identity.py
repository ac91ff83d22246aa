"""The identity of a run: a digest of its settings, and the overrides that were typed."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evosweep.core.files import digest
from evosweep.core.redact import redact

ELSEWHERE = (
    "seed",
    "name",
    "resume",
    "tracking",
    "storage",
    "report",
    "tasks",
    "export",
    "workers",
    "hydra",
)  # changes no figure but by chance
SHOWN_BY_NAME = (
    "sampler=",
    "resume=",
    "seed=",
    "tokens.seed=",
    "name=",
    "tracking",
    "storage",
    "export",
    "report",
    "tasks",
    "hydra",
)


@dataclass(frozen=True)
class RunIdentity:
    """Digest of a run's resolved settings without those that change no figure (name, tracking, storage ...) or change
    it by chance (the seeds of search and calibration).

    Runs with one identity are repetitions of one another; a comparison takes their mean.
    """

    digest: str

    @classmethod
    def of(cls, config: DictConfig) -> "RunIdentity":
        """Return the identity of a configuration."""
        settings: Any = OmegaConf.to_container(config, resolve=True)
        settings["data"].pop("validation", None)  # texts that are reported beside
        settings["tokens"].pop("seed", None)  # which windows calibrate: by chance, too
        return cls(digest({key: value for key, value in settings.items() if key not in ELSEWHERE}))

    def __str__(self) -> str:
        return self.digest


def overrides_of(task: list[str]) -> list[str]:
    """Return what was overridden for a job, but for what its name shows anyway."""
    plain = [override.lstrip("+") for override in task]
    return [redact(override) for override in plain if not override.startswith(SHOWN_BY_NAME)]
