"""Proof of an export: what was scored, and what was written, are the original model with the chosen levels' weights."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from evosweep.core.errors import ExportError
from evosweep.core.problem import Genome
from evosweep.evaluate.population import Evaluator
from evosweep.models.activations import NONE
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.slots import OuterSlot, Slot

ROUNDED_TOLERANCE = 0.05  # where inputs are rounded: the last bit of one may decide which of two values it becomes
ORIGINAL = "the model itself, with the chosen levels' weights written into it,"
EXPORTED = "the exported model"


class Chosen(Protocol):
    """An allocation applied to the model; base.Winner is one."""

    @property
    def genome(self) -> Genome: ...

    @property
    def evaluator(self) -> Evaluator: ...

    @property
    def slots(self) -> Mapping[Slot, int]: ...

    def in_place(self) -> AbstractContextManager[None]: ...

    def in_model(self) -> AbstractContextManager[None]: ...

    def layers(self) -> dict[str, tuple[Slot, int]]: ...


def proved(winner: Chosen, reloaded: Any, tokens: torch.Tensor, *, tolerance: float) -> float:
    """Return the largest difference between the logits of a reloaded model and of the original one.

    The original runs by its own forward, with the levels' weights written into it, so that scoring and writing cannot
    share a mistake. Compared with inputs of layers as they are, and then as they were scored.

    Args:
        winner: The allocation.
        reloaded: The exported model.
        tokens: One row of token ids (1, tokens).
        tolerance: Share of the largest logit by which logits may differ.

    Raises:
        ExportError: The scored logits or the reloaded model's are others than the original model's.
    """
    evaluator = winner.evaluator
    model: Any = evaluator.anatomy.model
    given = evaluator.anatomy.arguments(tokens)
    inner = {slot.name: slot.module for slot in winner.slots if not isinstance(slot, OuterSlot | RoutedSlot)}
    with winner.in_place():
        paths = {slot.name: path for path, (slot, _) in winner.layers().items() if slot.name in inner}
    layers = {unit: reloaded.get_submodule(path) for unit, path in paths.items()}

    def compared(share: float) -> float:
        with winner.in_model(), evaluator.rounded_inputs(inner):
            original = _logits(model, given)
        _check_close(evaluator.logits(winner.genome, tokens), original, share, ORIGINAL)
        with evaluator.rounded_inputs(layers):
            return _check_close(_logits(reloaded, given), original, share, EXPORTED)

    with evaluator.exact_inputs():
        difference = compared(tolerance)
    return difference if evaluator.resources.activations == NONE else compared(ROUNDED_TOLERANCE)


def _logits(model: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's fp32 logits (tokens, vocabulary) for one row of token ids, with an image if they hold one."""
    logits: torch.Tensor = model(**given, use_cache=False).logits[0].float()
    return logits


def _check_close(logits: torch.Tensor, original: torch.Tensor, share: float, what: str) -> float:
    """Return the largest difference of two models' logits.

    Args:
        logits: As they were scored, or of the exported model.
        original: Of the original model with the levels' weights.
        share: Of the largest logit, by which they may differ.
        what: Which model is wrong then.

    Raises:
        ExportError: They differ by more.
    """
    difference = float((logits - original).abs().max())
    scale = float(original.abs().max())
    if not difference <= share * max(scale, 1.0):
        raise ExportError(
            f"{what} does not give the logits that were scored: they differ by {difference:.3g} "
            f"(largest logit {scale:.3g})"
        )
    return difference
