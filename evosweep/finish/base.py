"""The protocol of finishing steps: they learn parameters of the winner that belong to no unit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.problem import Genome, Problem
from evosweep.evaluate.population import Evaluator
from evosweep.models.anatomy import Anatomy
from evosweep.store.units import Units

TUNED = "tuned.safetensors"  # in the run's folder: the parameters that a finishing step changed


@dataclass(frozen=True)
class Finished:
    """What a finishing step found.

    Attributes:
        tuned: New values of parameters by name, in the model's type; empty where they were no better.
        facts: What ``result.json`` says of it under ``finish``.
    """

    tuned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class NoFinish:
    """The winner stays as the search scored it."""

    def check(self, anatomy: Anatomy, units: Units | None = None) -> None:
        """Accept any model."""

    def run(self, genome: Genome, *, problem: Problem, evaluator: Evaluator, seed: int, progress: Progress) -> Finished:
        """Return nothing.

        Args:
            genome: Level of every unit.
            problem: Units and their levels.
            evaluator: Has the model and the levels.
            seed: Of all randomness.
            progress: Shows how far it is.
        """
        del genome, problem, evaluator, seed, progress
        return Finished()


def save_tuned(folder: Path, tuned: Mapping[str, torch.Tensor]) -> None:
    """Write tuned parameters into a run's folder, where there are any."""
    if tuned:
        temporary = folder / f"{TUNED}.new"
        save_file({name: value.cpu().contiguous() for name, value in tuned.items()}, temporary)
        temporary.replace(folder / TUNED)


def load_tuned(folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters that a run tuned, none where it did not.

    Raises:
        EvosweepError: The file is damaged.
    """
    path = folder / TUNED
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EvosweepError(f"{path} is damaged: remove it to export without it, or run the search again") from error
