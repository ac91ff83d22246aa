"""Interface of the statistics that compressors read, and the look-up of their modules by name.

The module of a statistic offers one of two things:

- ``Measurement``: a class that is filled with a shared input, batch by batch, while calibration walks through the
  blocks (the blocks before it are compressed already);
- ``measure_model``: a function that runs the dense model itself, once, before the walk.
"""

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import torch

from evosweep.compressors.base import Compressor
from evosweep.core.errors import StoreError, did_you_mean
from evosweep.core.events import Progress
from evosweep.models.anatomy import Anatomy
from evosweep.parallel import all_reduce_sum
from evosweep.store.weighting import LEAST_NORM, Weighting

PACKAGE = "evosweep.store.statistics"


@dataclass(frozen=True)
class InputBatch:
    """One batch of an input that some layers share; what several measurements use is calculated once.

    Attributes:
        values: The input as the layers are given it, shape (..., in).
        weighting: How tokens are weighted.
        windows: Windows in the batch, whose tokens follow each other.
        received: Attention that the tokens receive, shape (windows, seq_len), where the weighting reads it.
    """

    values: torch.Tensor
    weighting: Weighting
    windows: int = 1
    received: torch.Tensor | None = None

    @cached_property
    def rows(self) -> torch.Tensor:
        """One row a token, fp32, shape (tokens, in)."""
        return self.values.reshape(-1, self.values.shape[-1]).float()

    @cached_property
    def squares(self) -> torch.Tensor:
        """The squares of ``rows``."""
        return self.rows.square()

    @cached_property
    def weighted_rows(self) -> torch.Tensor:
        """Rows times the square roots of their tokens' weights."""
        rows = self.rows
        if self.weighting.divisor is not None:
            norms = self.squares.sum(dim=1, keepdim=True).sqrt_().clamp_(min=LEAST_NORM)
            rows = rows / self.weighting.divisor(norms.view(self.windows, -1)).view(-1, 1)
        if self.weighting.importance is not None and self.received is not None:
            rows = rows * self.weighting.importance(self.received).sqrt().view(-1, 1)
        return rows


class Measurement(Protocol):
    """Measures one shared input; constructed with its width ``columns`` and the ``device`` of its batches."""

    def add(self, batch: InputBatch) -> None:
        """Add the tokens of one batch to the statistic."""

    def finish(self) -> Any:
        """Return the statistic over the batches of all processes."""


class ModelMeasurement(Protocol):
    """Signature of ``measure_model``."""

    def __call__(
        self, anatomy: Anatomy, windows: torch.Tensor, *, batch_tokens: int, progress: Progress
    ) -> Mapping[str, Any]:
        """Return the statistic of every unit by name.

        Args:
            anatomy: The dense model.
            windows: This process's calibration windows on the model's device, shape (windows, seq_len).
            batch_tokens: Tokens that may run through the model at once.
            progress: Told what takes long.
        """


def statistic_module(name: str) -> ModuleType:
    """Return the module of a statistic.

    Args:
        name: Of a module of this package, or the dotted path of a module elsewhere.

    Raises:
        StoreError: There is no such module, or it measures nothing.
    """
    path = name if "." in name else f"{PACKAGE}.{name}"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        package = importlib.import_module(PACKAGE)
        known = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name not in {"base", "walk"}]
        raise StoreError(f"there is no statistic {name!r}{did_you_mean(name, known)}: {error}") from error
    if not (hasattr(module, "Measurement") or hasattr(module, "measure_model")) or module.__name__ == __name__:
        raise StoreError(f"{path!r} is no statistic: it offers neither `Measurement` nor `measure_model`")
    return module


def check_needs(compressor: Compressor) -> frozenset[str]:
    """Return the statistics that a compressor needs.

    Raises:
        StoreError: It does not say, or one of them is unknown.
    """
    needs = getattr(compressor, "needs", None)
    if not isinstance(needs, Collection) or isinstance(needs, str):
        raise StoreError(f"{type(compressor).__name__}.needs must be a set of names of statistics, got {needs!r}")
    for name in needs:
        statistic_module(name)
    return frozenset(needs)


def mean_over_tokens(total: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a sum over tokens, divided by their number, over all processes; ``total`` becomes the whole sum.

    Args:
        total: This process's sum.
        tokens: Tokens in it.
    """
    count = torch.tensor([tokens], device=total.device)
    all_reduce_sum(total, count)
    return total / int(count)


class MeanOfColumns:
    """Base of a measurement that is one mean over tokens for every column of the input.

    Args:
        columns: Width of the input.
        device: Device of its batches.
    """

    def __init__(self, *, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, device=device)
        self.tokens = 0

    def finish(self) -> torch.Tensor:
        """Return the mean over the tokens of all processes, shape (in,)."""
        return mean_over_tokens(self.total, self.tokens)
