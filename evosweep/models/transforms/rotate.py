"""Rotation of a dense model: residual stream and value heads, checked by the logits before and after."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from evosweep.core.checks import check_bool, check_choice, check_int
from evosweep.core.errors import ModelError, SettingError
from evosweep.core.events import Progress
from evosweep.models.decoder import find_blocks
from evosweep.models.expert_slots import slot_at
from evosweep.models.load import LoadedModel
from evosweep.models.slots import LinearSlot, slot_kind
from evosweep.models.towers import has_towers
from evosweep.models.transforms.base import Transform
from evosweep.models.transforms.orthogonal import KINDS, rotation
from evosweep.models.transforms.residual import rotate_stream, untie
from evosweep.models.transforms.values import find_value_path, rotate_source, rotate_target
from evosweep.models.transforms.wiring import Wiring, find_wiring
from evosweep.models.verify import check_causal

TOLERANCE = 1e-4  # of the largest logit, in fp32


class Rotate(Transform):
    """Rotates a model, so that its weights have fewer outliers, and leaves its logits as they are.

    QuaRot (arXiv 2404.00456), SpinQuant (2405.16406) and RSQ (2503.01820) do the same before quantizing. All is
    computed in float64 and stored in the model's own type.

    Args:
        kind: ``hadamard`` (with random signs) or ``orthogonal`` (random).
        seed: Of the matrices.
        residual: Rotate the residual stream. Gains of norms are folded into the layers that read them, and a tied head
            is untied.
        values: Rotate the values of each attention, and its output projection back.

    Raises:
        SettingError: Unknown kind, or neither of the two is to be rotated.
    """

    def __init__(self, *, kind: str = "hadamard", seed: int = 0, residual: bool = True, values: bool = True) -> None:
        self.kind = check_choice("kind", kind, KINDS)
        self.seed = check_int("seed", seed, low=0)
        self.residual = check_bool("residual", residual)
        self.values = check_bool("values", values)
        if not (residual or values):
            raise SettingError("residual", allowed="true where values=false", got=residual, hint="or transform=none")

    def apply(self, loaded: LoadedModel, *, progress: Progress) -> LoadedModel:
        """Return the rotated model, which gives the same logits and is a plain model of its family.

        Args:
            loaded: The dense model; its weights are changed in place.
            progress: Shows what is done.

        Raises:
            ModelError: Its norms cannot be folded, or the rotated model gives other logits.
        """
        model = loaded.model
        if self.residual and has_towers(model):
            raise ModelError(
                f"transform=rotate turns the hidden states of text alone, and {type(model).__name__} adds those of "
                "images to them: transform.residual=false"
            )
        progress.say(f"rotating {loaded.name}")
        added = untie(model) if self.residual else 0
        with torch.no_grad(), widened(model):
            device = next(model.parameters()).device
            expected = check_causal(model, device)
            wiring = find_wiring(model)
            if self.residual:
                wiring.check(type(model).__name__)
                q = self._matrix(wiring.hidden, "residual", device, keeps_mean=wiring.centers)
                rotate_stream(wiring, q)
                check_same(model, expected, f"norms of {type(model).__name__} cannot be folded")
            if self.values and not self._rotate_values(model, wiring, expected):
                progress.say(f"the values of {type(model).__name__} are in no layout that can be rotated: they stay")
            check_same(model, expected, f"values of {type(model).__name__} cannot be rotated")
        if not added:
            return loaded
        note = f"transform=rotate unties the head, which adds {added / 8e6:.3f} MB"
        progress.say(note)
        return replace(loaded, size_note=note)

    def _matrix(self, size: int, purpose: str, device: torch.device, *, keeps_mean: bool = False) -> torch.Tensor:
        made = rotation(size, kind=self.kind, seed=self.seed, purpose=purpose, keeps_mean=keeps_mean)
        return torch.from_numpy(np.ascontiguousarray(made)).to(device)

    def _rotate_values(self, model: nn.Module, wiring: Wiring, expected: torch.Tensor) -> bool:
        """Rotate the values of every block; return whether they were found."""
        block_path, blocks = find_blocks(model)
        device = expected.device
        layers = [
            slot_at(model, f"{block_path}.0.{name}")
            for name, module in blocks[0].named_modules()
            if slot_kind(module) is not None
        ]
        trial = partial(self._matrix, purpose="trial", device=device)
        path = find_value_path(model, wiring, layers, partial(_differs, model, expected), trial)
        if path is None:
            return False
        for index, block in enumerate(blocks):
            matrix = self._matrix(path.width, f"values {index}", device)
            source, target = (_slot(block, name) for name in (path.source, path.target))
            if source is None or target is None:  # a block of another kind
                continue
            rotate_source(source, path, matrix)
            rotate_target(target, matrix)
        return True


def _slot(block: nn.Module, path: str) -> LinearSlot | None:
    try:
        return slot_at(block, path)
    except ModelError:
        return None


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Hold weights in fp32 while the context lasts, then as before: in their own types, page-locked if they were."""
    homes: list[tuple[nn.Parameter, torch.dtype, torch.Tensor | None]] = []
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            locked = parameter.data if parameter.is_pinned() else None
            homes.append((parameter, parameter.dtype, locked))
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype, locked in homes:
            parameter.data = parameter.data.to(dtype) if locked is None else locked.copy_(parameter.data)


def check_same(model: nn.Module, expected: torch.Tensor, what: str) -> None:
    """Check that a model's logits are still those expected.

    Args:
        model: After it was transformed.
        expected: What ``check_causal`` returned before.
        what: Beginning of the error's message.

    Raises:
        ModelError: They differ.
    """
    difference = _difference(model, expected)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{what}: its logits differ by {difference:.2g} of the largest afterwards, its layers do not read and "
            "write the residual stream in a way that is known here"
        )


def _differs(model: nn.Module, expected: torch.Tensor) -> bool:
    return not _difference(model, expected) <= TOLERANCE


def _difference(model: nn.Module, expected: torch.Tensor) -> float:
    found = check_causal(model, expected.device)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
