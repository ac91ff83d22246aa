"""Figure: which layer of which block got which level."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from evosweep.core.allocation import Allocation
from evosweep.core.events import SearchResult
from evosweep.core.problem import Problem
from evosweep.tracking.palette import DARK, MISSING, level_styles, listed

CELL = 28  # pixels
FONT = 11  # pixels
SMALL = 9  # pixels, for labels of four letters and more
GAP = 8  # pixels between parts of a picture
DECADE = 10  # from here on a scale is logarithmic
MOST_LABELLED = 48  # blocks; cells of deeper models are too narrow for a label


class LevelHeatmap:
    """Blocks across, layers down, one colour a level; under it how sensitive each layer is, where that is known."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``allocation.png``."""
        styles = level_styles(result.problem)
        names, rows, blocks = level_table(result.problem, result.allocation)
        width = max(6.0, 2.4 + 0.32 * len(blocks))
        per_line = max(1, int(width / 1.1))
        legend = listed(list(styles.values()))
        lines = -(-len(legend) // per_line)
        errors = error_table(result.problem)
        known = any(value is not None for line in errors for value in line)
        height = 1.5 + 0.32 * len(rows) + 0.25 * lines
        figure = Figure(figsize=(width, height + (0.9 + 0.32 * len(rows)) * known), layout="constrained")
        axis, *others = figure.subplots(1 + known, 1, squeeze=False)[:, 0]
        if known:
            _draw_errors(figure, others[0], errors, rows, blocks)
        pixels = np.array([[styles[name].colour if name else MISSING for name in line] for line in names])
        axis.imshow(pixels.astype(np.uint8), aspect="auto")
        axis.set_yticks(range(len(rows)), rows)
        shown = range(0, len(blocks), max(1, len(blocks) // 15))
        axis.set_xticks(shown, [str(blocks[index]) for index in shown])
        axis.set_xlabel("block")
        axis.set_xticks(np.arange(len(blocks) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
        axis.tick_params(which="minor", length=0)
        for row, line in enumerate(names):
            for column, name in enumerate(line):
                if name and len(blocks) <= MOST_LABELLED:
                    ink = np.array(styles[name].ink) / 255
                    size = 8 if len(styles[name].label) < 4 else 6
                    axis.text(column, row, styles[name].label, ha="center", va="center", fontsize=size, color=ink)
        figure.legend(
            handles=[Patch(color=style.hex, label=_named(style.name, style.label)) for style in legend],
            loc="outside lower center",
            ncols=min(len(legend), per_line),
            fontsize=8,
            frameon=False,
        )
        axis.set_title(f"{result.sampler}, seed {result.seed}: level of every layer", fontsize=10)
        figure.savefig(folder / "allocation.png", dpi=120)


def error_table(problem: Problem) -> list[list[float | None]]:
    """Return the relative output error of each unit at the uniform allocation's level, by (kind, block).

    None stands where a block has no such layer, or its error is not known or zero.
    """
    rows = list(dict.fromkeys(unit.kind for unit in problem.units))
    blocks = sorted({unit.block for unit in problem.units})
    table: list[list[float | None]] = [[None] * len(blocks) for _ in rows]
    for unit, level in zip(problem.units, problem.uniform(), strict=True):
        error = unit.levels[int(level)].relative_error
        table[rows.index(unit.kind)][blocks.index(unit.block)] = error or None
    return table


def _draw_errors(
    figure: Figure, axis: Any, errors: Sequence[Sequence[float | None]], rows: Sequence[str], blocks: Sequence[int]
) -> None:
    """Draw how sensitive each layer is, under its level.

    Args:
        figure: Gets the colour bar.
        axis: Where to draw.
        errors: As ``error_table`` returns them.
        rows: Names of the layers.
        blocks: Their numbers.
    """
    values = 100 * np.array([[np.nan if value is None else value for value in line] for line in errors])
    shown = np.ma.masked_invalid(values)
    axis.set_facecolor([value / 255 for value in MISSING])
    wide = shown.max() > DECADE * shown.min()
    drawn = axis.imshow(shown, aspect="auto", cmap="cividis", norm=LogNorm() if wide else None)
    bar = figure.colorbar(drawn, ax=axis, pad=0.01, format=FuncFormatter(lambda value, _: f"{value:.3g}"))
    if wide:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label("error, %")
    axis.set_yticks(range(len(rows)), rows)
    ticks = range(0, len(blocks), max(1, len(blocks) // 15))
    axis.set_xticks(ticks, [str(blocks[index]) for index in ticks])
    axis.set_xlabel("block")
    axis.set_title("sensitivity: relative output error of every layer at uniform's level", fontsize=10)


def level_table(problem: Problem, allocation: Allocation) -> tuple[list[list[str]], list[str], list[int]]:
    """Return the names of an allocation's levels by (kind, block), and the names of rows and columns.

    A name is empty where a block has no such layer.
    """
    rows = list(dict.fromkeys(unit.kind for unit in problem.units))
    blocks = sorted({unit.block for unit in problem.units})
    row_of = {kind: index for index, kind in enumerate(rows)}
    column_of = {block: index for index, block in enumerate(blocks)}
    names = [[""] * len(blocks) for _ in rows]
    for unit in problem.units:
        names[row_of[unit.kind]][column_of[unit.block]] = allocation[unit.name]
    return names, rows, blocks


def level_image(problem: Problem, allocation: Allocation) -> npt.NDArray[np.uint8]:
    """Return the same as a picture with labels and a legend that lists every level, used or not.

    Size and legend depend on the problem alone, so that pictures of several generations can be played as a film. Takes
    some ten milliseconds: fast enough for every generation.

    Returns:
        Array of shape (height, width, 3), 0 to 255.
    """
    styles = level_styles(problem)
    names, rows, blocks = level_table(problem, allocation)
    font = ImageFont.load_default(FONT)
    small = ImageFont.load_default(SMALL)
    left = int(max(font.getlength(row) for row in rows)) + 2 * GAP
    legend = listed(list(styles.values()))
    step = int(max(font.getlength(_named(style.name, style.label)) for style in legend)) + CELL + GAP
    width = max(left + CELL * len(blocks) + GAP, left + step)
    per_line = max(1, (width - left) // step)
    lines = -(-len(legend) // per_line)
    bottom = GAP + CELL * len(rows)
    picture = Image.new("RGB", (width, bottom + CELL + lines * CELL + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for row, kind in enumerate(rows):
        draw.text((left - GAP, GAP + CELL * row + CELL // 2), kind, fill=DARK, font=font, anchor="rm")
        for column, name in enumerate(names[row]):
            x = left + CELL * column
            y = GAP + CELL * row
            box = (x, y, x + CELL - 2, y + CELL - 2)
            draw.rectangle(box, fill=styles[name].colour if name else MISSING)
            if name:
                centre = (x + CELL // 2 - 1, y + CELL // 2 - 1)
                style = styles[name]
                chosen = font if len(style.label) < 4 else small
                draw.text(centre, style.label, fill=style.ink, font=chosen, anchor="mm")
    every = max(1, len(blocks) // 15)
    for column in range(0, len(blocks), every):
        centre = (left + CELL * column + CELL // 2 - 1, bottom + CELL // 2)
        draw.text(centre, str(blocks[column]), fill=DARK, font=font, anchor="mm")
    draw.text((left - GAP, bottom + CELL // 2), "block", fill=DARK, font=font, anchor="rm")
    for index, style in enumerate(legend):
        x = left + step * (index % per_line)
        y = bottom + CELL + CELL * (index // per_line)
        draw.rectangle((x, y + 4, x + CELL - 8, y + CELL - 4), fill=style.colour)
        text = _named(style.name, style.label)
        draw.text((x + CELL - 3, y + CELL // 2), text, fill=DARK, font=font, anchor="lm")
    return np.asarray(picture)


def _named(name: str, label: str) -> str:
    """Return a legend's entry: the level's name, and its label where that does not follow from the name."""
    return f"{label} = {name}" if label.isdigit() and not name.startswith(label) else name
