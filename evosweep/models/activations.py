"""Activations in eight bits: the input of every compressed layer is rounded while candidates are scored.

Either every token has a scale of its own, from its largest magnitude (token-wise and dynamic: the W8A8 and W4A8 schemes
of "Give Me BF16 or Give Me Death", arXiv 2411.02355, section 3, and ZeroQuant-FP, arXiv 2307.09782), or a layer has one
scale for all tokens, from its largest input on calibration text (static).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from evosweep.core.checks import check_choice
from evosweep.core.errors import SettingError

NONE = "none"
STATIC = "_static"
INT8 = "int8"
LARGEST = {INT8: 127.0, "fp8": 448.0}  # of symmetric int8, and of torch.float8_e4m3fn
CHOICES = (NONE, *LARGEST, *(f"{form}{STATIC}" for form in LARGEST))
INPUT_RANGE = "input_range"  # column of the manifest: the largest magnitude of a layer's input on calibration text
LEAST_SCALE = 1e-12


def rounded(values: torch.Tensor, form: str, largest: float | None = None) -> torch.Tensor:
    """Return values rounded to eight bits and scaled back, in their own type.

    Args:
        values: Inputs of a layer, shape (..., in).
        form: ``int8``: round(x / s) · s with s = max|x| / 127; ``fp8``: x / s rounded to E4M3 with s = max|x| / 448.
        largest: max|x| for all tokens together, larger ones are clamped; None: each token's own.
    """
    exact = values.float()
    limit = LARGEST[form]
    if largest is None:
        scale = (exact.abs().amax(dim=-1, keepdim=True) / limit).clamp_(min=LEAST_SCALE)
    else:
        scale = exact.new_tensor(max(largest / limit, LEAST_SCALE))
    scaled = (exact / scale).clamp_(-limit, limit)
    codes = scaled.round_() if form == INT8 else scaled.to(torch.float8_e4m3fn).float()
    return codes.mul_(scale).to(values.dtype)


def is_static(activations: str) -> bool:
    """Return whether a choice of activations needs ranges that were measured on calibration text."""
    return activations.endswith(STATIC)


def no_ranges(activations: str, *, owner: object) -> SettingError:
    """Return the error of static activations where the store has no ranges of inputs.

    Args:
        activations: What was asked for.
        owner: The object that it is a setting of.
    """
    return SettingError(
        "activations",
        owner=owner,
        allowed=f"{NONE} or {', '.join(LARGEST)} (a scale for each token) with a level store that has no input ranges",
        got=activations,
        hint="store.input_ranges=true builds one that has them",
    )


@dataclass
class RoundedInputs:
    """Rounds what layers are given.

    Attributes:
        form: ``int8`` or ``fp8``.
        ranges: Largest input of each unit by name, for static scales; None: each token has its own scale.
    """

    form: str
    ranges: Mapping[str, float] | None = None
    _last: tuple[Any, ...] = field(default=(), repr=False)  # input, range, and what it was rounded to

    @classmethod
    def of(cls, activations: str, columns: Mapping[str, Mapping[str, float]], *, owner: object) -> "RoundedInputs":
        """Return what a choice other than ``none`` asks for.

        Args:
            activations: One of ``CHOICES``.
            columns: The manifest's columns of each layer, by its name.
            owner: The object that it is a setting of, for errors.

        Raises:
            SettingError: Static scales, and the columns lack the ranges.
        """
        form = check_choice("activations", activations, CHOICES).removesuffix(STATIC)
        if not is_static(activations):
            return cls(form)
        if any(INPUT_RANGE not in found for found in columns.values()):
            raise no_ranges(activations, owner=owner)
        return cls(form, {name: found[INPUT_RANGE] for name, found in columns.items()})

    @contextmanager
    def of_layers(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Round the inputs of layers while the context lasts.

        Args:
            layers: The module of each unit, by the unit's name.
        """
        with ExitStack() as hooks:
            for name, module in layers.items():
                hooks.callback(module.register_forward_pre_hook(self._hook(name)).remove)
            hooks.callback(self._forget)
            yield

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return the inputs (..., in) of a unit as they are rounded for it."""
        return rounded(values, self.form, None if self.ranges is None else self.ranges[name])

    def _hook(self, name: str) -> Callable[..., tuple[Any, ...]]:
        largest = None if self.ranges is None else self.ranges[name]

        def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            del module
            return (self._rounded(given[0], largest), *given[1:])

        return hook

    def _rounded(self, values: torch.Tensor, largest: float | None) -> torch.Tensor:
        """Return rounded values, once for layers that are given the same tensor one after the other."""
        if not (self._last and self._last[0] is values and self._last[1] == largest):
            self._last = (values, largest, rounded(values, self.form, largest))
        return self._last[2]

    def _forget(self) -> None:
        self._last = ()
