"""A colour and a short label for each level, the same in every picture of a problem."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps

from evosweep.core.problem import Problem

Rgb = tuple[int, int, int]
# Okabe and Ito's colours, which colour-blind readers can distinguish: https://jfly.uni-koeln.de/color/
DISTINCT = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#888888")
FOUND = DISTINCT[0]
UNIFORM = DISTINCT[1]
MISSING: Rgb = (225, 225, 225)  # a block has no such layer
DARK: Rgb = (20, 20, 20)
LIGHT: Rgb = (255, 255, 255)
COLOURS = "viridis"
MOST_LISTED = 24  # a legend of more levels lists evenly spaced ones
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class LevelStyle:
    """How a level is drawn.

    Attributes:
        name: Of the level.
        label: Short enough for a cell of a heatmap.
        colour: Red, green and blue, 0 to 255.
    """

    name: str
    label: str
    colour: Rgb

    @property
    def ink(self) -> Rgb:
        """Colour of text that can be read on ``colour``: relative luminance by ITU-R BT.601."""
        red, green, blue = self.colour
        return DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else LIGHT

    @property
    def hex(self) -> str:
        """The colour as ``#rrggbb``."""
        return "#{:02x}{:02x}{:02x}".format(*self.colour)


def level_styles(problem: Problem) -> dict[str, LevelStyle]:
    """Return the style of every level by name, cheapest level (by mean bits per weight) first."""
    prices: dict[str, list[float]] = {}
    for unit in problem.units:
        for level in unit.levels:
            prices.setdefault(level.name, []).append(level.cost / max(unit.numel, 1))
    names = sorted(prices, key=lambda name: float(np.mean(prices[name])))
    shades = colormaps[COLOURS](np.linspace(0, 1, max(len(names), 2)))[:, :3]
    colours = (255 * shades).round().astype(int).tolist()
    return {
        name: LevelStyle(name, label, (colour[0], colour[1], colour[2]))
        for name, label, colour in zip(names, short_labels(names), colours, strict=False)
    }


def short_labels(names: Sequence[str]) -> list[str]:
    """Return a label of few characters for each name, all different: ``3bit`` is ``3``, ``62.5%@4bit`` is ``62/4``.

    Where shortening makes two names alike they are numbered; the legend says which is which.
    """
    short = [_PERCENT.sub(lambda found: f"{float(found[1]):.0f}", name) for name in names]
    short = [label.replace("bit", "").replace("@", "/").replace("dropped", "–") for label in short]
    exact = [name.replace("bit", "").replace("@", "/").replace("%", "") for name in names]
    for labels in (short, exact):
        if len(set(labels)) == len(names) and max(map(len, labels)) <= 6:
            return labels
    return [str(index) for index in range(len(names))]


def listed(styles: Sequence[LevelStyle]) -> list[LevelStyle]:
    """Return the styles that a legend names: all, or evenly spaced ones where there are too many to read."""
    if len(styles) <= MOST_LISTED:
        return list(styles)
    return [styles[index] for index in np.linspace(0, len(styles) - 1, MOST_LISTED // 2).round().astype(int)]
