"""An allocation as other quantizers know it: width, group and number format of every layer, without our codes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from evosweep.core.problem import Genome, Problem

INTEGER_WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Setting:
    """What a level is to a tool that quantizes by itself.

    Attributes:
        level: Its name in the allocation.
        columns: Input features of the layer.
        bits: Width of its integer codes; None where it has none.
        group: Columns that share a scale; None: a whole row.
        symmetric: Whether integer codes have no zero of their own.
        number: Name of its floating-point format: ``nvfp4``, ``mxfp4``, ``fp8`` ...; empty for others.
        ggml: Name of its ggml type, where the level is one: ``Q4_K``.
        dense: Whether the layer stays as it is.
    """

    level: str
    columns: int
    bits: int | None = None
    group: int | None = None
    symmetric: bool = False
    number: str = ""
    ggml: str = ""
    dense: bool = False

    def __str__(self) -> str:
        """Return the level in words: ``3 bits in groups of 64, asymmetric``."""
        if self.bits is None:
            return self.number or self.ggml or self.level
        scale = "a scale a row" if self.group is None else f"groups of {self.group}"
        return f"{self.bits} bits, {scale}, {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class Listing:
    """An allocation, layer by layer.

    Attributes:
        model: Name of the base model, as shown in commands.
        family: ``model_type`` of its config.
        blocks: Number of its decoder blocks.
        layers: Setting of every layer, by its path in the model.
        genome: The allocation that it is of.
        problem: Units and levels of that.
    """

    model: str
    family: str
    blocks: int
    layers: Mapping[str, Setting]
    genome: Genome
    problem: Problem

    @property
    def drops(self) -> bool:
        """Whether parts of the model may be dropped."""
        return any(unit.only_drops for unit in self.problem.units)

    def quantized(self) -> dict[str, Setting]:
        """Return the layers that do not stay as they are."""
        return {path: setting for path, setting in self.layers.items() if not setting.dense}

    def with_head(self) -> bool:
        """Return whether the output head has a level of its own."""
        return "lm_head" in self.layers


class Tool(Protocol):
    """A module that writes the recipes of one tool."""

    NAME: str
    """Of the tool, as it writes itself."""

    def refusal(self, setting: Setting, family: str) -> str:
        """Return why the tool cannot make a level; empty where it can.

        Args:
            setting: The level.
            family: ``model_type`` of the model.
        """

    def files(self, listing: Listing) -> dict[str, str]:
        """Return the files of the recipe: their text by name."""

    def command(self, listing: Listing) -> str:
        """Return what is typed, or run in Python, beside those files."""


def fitted(setting: Setting, refusal: Callable[[Setting], str]) -> Setting | None:
    """Return the setting with the nearest width that a tool can make, wider ones first; None if there is none.

    At every width, codes without zeros of their own are tried too.

    Args:
        setting: A level.
        refusal: Of the tool, for this model.
    """
    if not refusal(setting):
        return setting
    if setting.bits is None:
        return None
    bits = setting.bits
    near = sorted(INTEGER_WIDTHS, key=lambda width: (abs(width - bits), -width))
    candidates = (
        replace(setting, bits=width, symmetric=symmetric)
        for width in near
        for symmetric in dict.fromkeys((setting.symmetric, True))
    )
    return next((candidate for candidate in candidates if not refusal(candidate)), None)


def commonest(settings: Iterable[Setting]) -> Setting:
    """Return the setting that most layers have, regardless of its level's name and the layer's width."""
    plain = [replace(setting, level="", columns=0) for setting in settings]
    return Counter(plain).most_common(1)[0][0]
