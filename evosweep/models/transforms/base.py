"""Base class of transforms: the dense model is changed before any level is made of it, its logits are not."""

import torch

from evosweep.core.events import Progress
from evosweep.models.load import LoadedModel


class Transform:
    """Leaves the model as it is; other transforms derive from it."""

    def apply(self, loaded: LoadedModel, *, progress: Progress) -> LoadedModel:
        """Return the transformed model, which gives the same logits and is a plain model of its family.

        Args:
            loaded: The dense model; its weights are changed in place.
            progress: Shows what is done.

        Raises:
            ModelError: The model cannot be transformed.
        """
        del progress
        return loaded

    def calibrate(self, loaded: LoadedModel, calibration: torch.Tensor, *, progress: Progress) -> LoadedModel:
        """Return the transformed model, for transforms that measure the dense model on text; others leave it alone.

        Args:
            loaded: What ``apply`` returned; its weights are changed in place.
            calibration: Token windows to measure on, shape (windows, seq_len).
            progress: Shows what is done.

        Raises:
            ModelError: The model cannot be transformed.
        """
        del calibration, progress
        return loaded
