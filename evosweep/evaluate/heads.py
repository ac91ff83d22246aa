"""A population's final hidden states through the head, dense or at one of its levels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from evosweep.core.errors import ModelError
from evosweep.core.lru import ByteLRU
from evosweep.evaluate.level_weights import LevelWeights, bytes_of
from evosweep.fitness.base import Fitness, Outputs, rows_at_once
from evosweep.models.anatomy import Anatomy
from evosweep.models.head import Head

WIDENED = 3  # times its bytes a head takes beside the weight itself: in fp32, of a half-precision model on a CPU
Targets = Mapping[str, Mapping[str, torch.Tensor]]
"""What every fitness needs of the dense model on one window, by the fitness's name."""


class Heads:
    """The dense head, and the head at each of its levels.

    Args:
        anatomy: The dense model.
        levels: Weights of all levels.
        unit: Index of the unit that is the head; None where the head is no unit.
        compiled: Whether the reduction over the vocabulary is compiled.
        limit: Most bytes that heads take beside their weights.
    """

    def __init__(
        self, anatomy: Anatomy, levels: LevelWeights, *, unit: int | None, compiled: bool, limit: float
    ) -> None:
        self.anatomy = anatomy
        self.levels = levels
        self.unit = unit
        self.compiled = compiled
        self._kept: ByteLRU[Head] = ByteLRU(limit=limit, size=lambda head: WIDENED * bytes_of(head.weight))

    def head(self, level: int | None) -> Head:
        """Return the head at a level; None is the dense one."""
        if level is None or self.unit is None:
            return self.anatomy.head
        weight = self.levels.weight((self.unit, level))
        return self._kept.get(level, lambda: self.anatomy.head.with_weight(weight))

    def losses(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        fitness: Sequence[Fitness],
        targets: Sequence[Targets],
        level: int | None,
    ) -> dict[str, torch.Tensor]:
        """Return each fitness's loss on every token, shape (rows, windows, tokens - 1), for rows at one head level.

        Args:
            hidden: Final hidden states (rows, windows, seq_len, hidden).
            tokens: Token ids (windows, seq_len).
            fitness: What to compute.
            targets: Of each window, for this level of the head.
            level: Level of the head; None is the dense one.
        """
        head = self.head(level)
        dense = None if level is None else self.anatomy.head
        losses = {one.name: torch.empty(hidden[..., 1:, 0].shape, device=hidden.device) for one in fitness}
        at_once = rows_at_once(head, tokens.shape[1] - 1, compiled=self.compiled)
        for index, window in enumerate(self.anatomy.pictures.plain(tokens)):
            for start in range(0, len(hidden), at_once):
                states = hidden[start : start + at_once, index, :-1]
                labels = window[1:].repeat(len(states))
                outputs = Outputs(head, states.flatten(0, 1), labels, compiled=self.compiled, other=dense)
                for one in fitness:
                    wanted = {name: _repeated(kept, len(states)) for name, kept in targets[index][one.name].items()}
                    found = one.losses(outputs, wanted).view(len(states), -1)
                    losses[one.name][start : start + len(states), index] = found
        return losses


def made_targets(fitness: Fitness, dense: Callable[[], Outputs], head: Head | None) -> dict[str, torch.Tensor]:
    """Return what a fitness needs of the dense model.

    Args:
        fitness: The fitness.
        dense: Runs the dense model.
        head: The compressed models' head, where it is not the dense one.
    """
    return fitness.targets(replace(dense(), other=head))


def _repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return tensor if times == 1 else tensor.repeat(times, *(1 for _ in tensor.shape[1:]))


def finite(losses: Sequence[torch.Tensor], anatomy: Anatomy) -> npt.NDArray[np.float32]:
    """Return the dense model's losses on some windows, shape (1, windows, tokens - 1).

    Raises:
        ModelError: One is NaN or infinite.
    """
    values = np.stack([loss.float().cpu().numpy() for loss in losses])[None]
    if not np.isfinite(values).all():
        raise ModelError(
            "the dense model's loss on this text is NaN or infinite in "
            f"{str(anatomy.dtype).removeprefix('torch.')}: choose another model.dtype (float32 has the widest "
            "range), or the checkpoint is damaged"
        )
    return values
