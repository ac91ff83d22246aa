"""A compressed layer as named tensors, and how formats turn it back into a weight or a layer function.

A payload may hold other payloads (``parts``), so that one compressor can wrap another. On disk all its tensors are in
one flat list, under path names (``base/codes``); a ``Layout`` says how to put them together again.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch.nn import functional

from evosweep.core.errors import StoreError

FORMATS = "evosweep.compressors.formats"
SEPARATOR = "/"


class LayerFunction(Protocol):
    """A compressed layer as a function of its input, for formats that are more than a weight."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs (..., out), without bias, for inputs (..., in)."""


class Format(Protocol):
    """What a module of a payload format offers: ``decode``, ``apply``, or both."""

    def decode(
        self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, "Payload"]
    ) -> torch.Tensor:
        """Return the fp32 weight (out, in), on the tensors' device.

        Args:
            tensors: The payload's own tensors.
            meta: Its numbers and words.
            parts: The payloads that it holds.
        """

    def apply(
        self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, "Payload"]
    ) -> LayerFunction:
        """Return the layer as a function, where a weight is not enough (rotated or quantized inputs).

        Args:
            tensors: The payload's own tensors.
            meta: Its numbers and words.
            parts: The payloads that it holds.
        """


@dataclass(frozen=True)
class Layout:
    """How a payload is put together from a flat mapping of tensors with path names.

    Attributes:
        format: Dotted path of the module that decodes it.
        tensors: Names of its own tensors.
        meta: Numbers and words that decoding needs; JSON.
        parts: Layouts of the payloads that it holds.
    """

    format: str
    tensors: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    parts: "Mapping[str, Layout]" = field(default_factory=dict)

    def paths(self, prefix: str = "") -> Iterator[str]:
        """Yield the path name of every tensor, those of parts included: ``scales``, ``base/codes``."""
        for name in self.tensors:
            yield prefix + name
        for name, part in self.parts.items():
            yield from part.paths(f"{prefix}{name}{SEPARATOR}")

    def assemble(self, flat: Mapping[str, torch.Tensor], prefix: str = "") -> "Payload":
        """Return the payload made of tensors by path name.

        Raises:
            KeyError: A tensor is missing.
        """
        return Payload(
            format=self.format,
            tensors={name: flat[prefix + name] for name in self.tensors},
            meta=self.meta,
            parts={name: part.assemble(flat, f"{prefix}{name}{SEPARATOR}") for name, part in self.parts.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values; ``from_json`` reads them."""
        facts: dict[str, Any] = {"format": self.format, "meta": dict(self.meta), "tensors": list(self.tensors)}
        return facts | ({"parts": {name: part.to_json() for name, part in self.parts.items()}} if self.parts else {})

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Layout":
        """Return the layout that ``to_json`` wrote.

        Raises:
            KeyError: A field is missing.
        """
        parts = {name: cls.from_json(part) for name, part in facts.get("parts", {}).items()}
        return cls(facts["format"], tuple(facts["tensors"]), facts["meta"], parts)


@dataclass(frozen=True)
class Payload:
    """A compressed layer.

    Attributes:
        format: The format's module: its dotted path, or its bare name if it is one of ``compressors/formats``.
        tensors: Its own tensors by name.
        meta: Numbers and words that decoding needs; JSON.
        parts: Payloads that it holds, by name.
        error: Its ``layer_error``, where the compressor knows that from its work.
    """

    format: str
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    parts: "Mapping[str, Payload]" = field(default_factory=dict)
    error: float | None = None

    @cached_property
    def weight(self) -> torch.Tensor:
        """The weight that it stands for: fp32, shape (out, in).

        Raises:
            StoreError: The format is unknown, or decodes to a layer function only.
        """
        module = format_module(self.format)
        if not hasattr(module, "decode"):
            raise StoreError(
                f"levels of the format {self.format!r} are layer functions without a weight; what scores and exports "
                "models here needs weights"
            )
        weight: torch.Tensor = module.decode(self.tensors, self.meta, self.parts)
        return weight

    @cached_property
    def function(self) -> LayerFunction:
        """The layer as a function of its input: the format's own, or multiplication with the weight."""
        module = format_module(self.format)
        if hasattr(module, "apply"):
            function: LayerFunction = module.apply(self.tensors, self.meta, self.parts)
            return function
        return lambda inputs: functional.linear(inputs, self.weight.to(inputs.dtype))

    @property
    def bits(self) -> int:
        """Bits of all its tensors, those of its parts included."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.flat().values())

    def layout(self) -> Layout:
        """Return how it is put together from ``flat`` tensors.

        Raises:
            StoreError: A name holds one of the separators of path names.
        """
        for name in (*self.tensors, *self.parts):
            if SEPARATOR in name or "|" in name:
                raise StoreError(f"tensors and parts of a payload must be named without '/' and '|', got {name!r}")
        parts = {name: part.layout() for name, part in self.parts.items()}
        return Layout(module_path(self.format), tuple(sorted(self.tensors)), dict(self.meta), parts)

    def flat(self) -> dict[str, torch.Tensor]:
        """Return all tensors by path name, those of its parts included."""
        own = dict(self.tensors)
        for part, payload in self.parts.items():
            own |= {f"{part}{SEPARATOR}{name}": tensor for name, tensor in payload.flat().items()}
        return own

    def output_error(self, weight: torch.Tensor, second_moment: torch.Tensor) -> float:
        """Return the layer's output error: what the compressor found, measured where it did not.

        Args:
            weight: The dense weight, fp32, shape (out, in).
            second_moment: Of the layer's input, shape (in, in).
        """
        return layer_error(weight - self.weight, second_moment) if self.error is None else self.error


def layer_error(difference: torch.Tensor, second_moment: torch.Tensor) -> float:
    """Return the mean over inputs x of w·‖D x‖²; NaN or infinity where fp32 overflows.

    Args:
        difference: D, dense weight minus compressed weight, shape (out, in).
        second_moment: Mean of w·x xᵀ, shape (in, in).
    """
    error = float(((difference @ second_moment) * difference).sum(dtype=torch.float64))
    return (
        0.0 if error < 0 else error
    )  # below zero by rounding alone; max(0, NaN) would be the error of a perfect level


def module_path(format_name: str) -> str:
    """Return the dotted path of a format's module; a bare name is one of ``compressors/formats``."""
    return format_name if "." in format_name else f"{FORMATS}.{format_name}"


@lru_cache
def format_module(format_name: str) -> ModuleType:
    """Return the module of a payload format.

    Only installed modules that offer ``decode`` or ``apply`` count, and none of Python's own.

    Raises:
        StoreError: There is no such module, or it is no payload format.
    """
    path = module_path(format_name)
    names = path.split(".")
    if not all(name.isidentifier() for name in names) or names[0] in sys.stdlib_module_names:
        raise StoreError(f"{format_name!r} is not the name of a payload format")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise StoreError(f"the payload format {path!r} cannot be imported ({error}); install its package") from error
    if not (callable(getattr(module, "decode", None)) or callable(getattr(module, "apply", None))):
        raise StoreError(f"{path!r} is no payload format: it offers neither `decode` nor `apply`")
    return module
