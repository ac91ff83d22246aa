"""SmoothQuant: outliers of activations are moved into the weights, by scales that norms and layers take up.

Xiao et al., arXiv 2211.10438: column j of what a norm gives is divided by s_j = max|X_j|^a / max|W_j|^(1-a) (equation
4), where W are all layers that read it, and their columns j are multiplied with s_j. The logits stay the same.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from evosweep.core.checks import check_number
from evosweep.core.errors import ModelError
from evosweep.core.events import Progress
from evosweep.models.load import LoadedModel
from evosweep.models.transforms.base import Transform
from evosweep.models.transforms.rotate import check_same, widened
from evosweep.models.transforms.wiring import Norm, find_wiring
from evosweep.models.verify import check_causal

LEAST = 1e-5  # of magnitudes, as in SmoothQuant's code: columns that are zero on calibration text are left alone
WINDOWS_AT_ONCE = 4


class Smooth(Transform):
    """Evens out the inputs of layers that read a norm, which then lose less when they are rounded to eight bits.

    Args:
        alpha: How much of a column's magnitude moves from activations to weights: 0.5 evens out both, 0 leaves the
            activations alone.

    Raises:
        SettingError: ``alpha`` is not from 0 to 1.
    """

    def __init__(self, *, alpha: float = 0.5) -> None:
        self.alpha = check_number("alpha", alpha, low=0, high=1)

    def calibrate(self, loaded: LoadedModel, calibration: torch.Tensor, *, progress: Progress) -> LoadedModel:
        """Return the smoothed model, which gives the same logits and is a plain model of its family.

        Args:
            loaded: The dense model; its weights are changed in place.
            calibration: Token windows (windows, seq_len) on which the largest inputs are measured.
            progress: Shows what is done.

        Raises:
            ModelError: No layer reads a norm alone, or the smoothed model gives other logits.
        """
        model = loaded.model
        progress.say(f"smoothing {loaded.name}")
        with torch.no_grad(), widened(model):  # norms are recognized by what they compute, in fp32
            inside = self._norms(model)
        if not inside:
            raise ModelError(f"{type(model).__name__} cannot be smoothed: no linear layer reads a norm that is known")
        largest = measured(model, inside, calibration)
        with torch.no_grad(), widened(model):
            expected = check_causal(model, next(model.parameters()).device)
            for norm in inside:
                self._smooth(norm, largest[norm.name])
            check_same(model, expected, f"{type(model).__name__} cannot be smoothed")
        return loaded

    @staticmethod
    def _norms(model: nn.Module) -> list[Norm]:
        """Return the norms in blocks that linear layers read and whose gain can be changed; the head's is left out."""
        wiring = find_wiring(model)
        known = [norm for norm in wiring.norms if norm.readers and wiring.head not in norm.readers]
        return [norm for norm in known if isinstance(getattr(norm.module, "weight", None), nn.Parameter)]

    def _smooth(self, norm: Norm, largest: torch.Tensor) -> None:
        weights = [slot.read() for slot in norm.readers]
        heaviest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).to(largest)
        scale = largest.clamp(min=LEAST).pow(self.alpha) / heaviest.clamp(min=LEAST).pow(1 - self.alpha)
        scale = torch.where((largest > 0) & (heaviest > 0), scale.clamp(min=LEAST), torch.ones_like(scale))
        module: Any = norm.module
        module.weight.data = ((module.weight.data + norm.offset) / scale - norm.offset).to(module.weight.dtype)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.data = (module.bias.data / scale).to(module.bias.dtype)
        for slot, weight in zip(norm.readers, weights, strict=True):
            slot.write(weight * scale)


@torch.no_grad()
def measured(model: nn.Module, norms: list[Norm], calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the largest magnitude of every column that norms give on calibration text, by the norm's name.

    Args:
        model: The dense model.
        norms: Some of its norms.
        calibration: Token windows, shape (windows, seq_len).
    """
    largest: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device
    with _watched(norms, largest):
        for batch in calibration.split(WINDOWS_AT_ONCE):
            model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)
    return largest


@contextmanager
def _watched(norms: list[Norm], largest: dict[str, torch.Tensor]) -> Iterator[None]:
    with ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.module.register_forward_hook(partial(_count, largest, norm.name)).remove)
        yield


def _count(largest: dict[str, torch.Tensor], name: str, _module: nn.Module, _given: Any, output: torch.Tensor) -> None:
    found = output.float().abs().flatten(0, -2).amax(dim=0)
    largest[name] = torch.maximum(largest[name], found) if name in largest else found
