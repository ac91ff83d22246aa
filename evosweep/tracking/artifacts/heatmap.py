"""Figure: which layer of which block got which level."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

from evosweep.core.allocation import Allocation
from evosweep.core.events import SearchResult
from evosweep.core.problem import Problem

CELL = 14  # pixels


class LevelHeatmap:
    """Blocks across, linears down, coloured by the winning level's nominal number."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``allocation.png``."""
        table, rows, blocks = level_table(result.problem, result.allocation)
        figure = Figure(figsize=(2.2 + 0.3 * len(blocks), 1.4 + 0.3 * len(rows)), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(table, cmap="viridis", aspect="auto")
        axis.set_yticks(range(len(rows)), rows)
        shown = range(0, len(blocks), max(1, len(blocks) // 15))
        axis.set_xticks(shown, [str(blocks[place]) for place in shown])
        axis.set_xlabel("block")
        for (row, block), value in np.ndenumerate(table):
            if np.isfinite(value) and len(blocks) <= 48:
                axis.text(block, row, f"{value:g}", ha="center", va="center", fontsize=7, color="white")
        figure.colorbar(image, ax=axis, label="level")
        axis.set_title(f"{result.sampler}, seed {result.seed}")
        figure.savefig(folder / "allocation.png", dpi=120)


def level_table(problem: Problem, allocation: Allocation) -> tuple[npt.NDArray[np.float64], list[str], list[int]]:
    """Return the nominal numbers of an allocation's levels, shape (kinds, blocks), and the names of rows and columns.

    Not a number where a block has no such layer; the level's place in its ladder where levels have no number.
    """
    rows = list(dict.fromkeys(unit.kind for unit in problem.units))
    blocks = sorted({unit.block for unit in problem.units})
    table = np.full((len(rows), len(blocks)), np.nan)
    for unit in problem.units:
        place = unit.level_names.index(allocation[unit.name])
        nominal = unit.levels[place].nominal
        table[rows.index(unit.kind), blocks.index(unit.block)] = place if nominal is None else nominal.number
    return table, rows, blocks


def level_image(problem: Problem, allocation: Allocation) -> npt.NDArray[np.uint8]:
    """Return the same as a picture, shape (kinds * CELL, blocks * CELL, 3); fast enough for every generation."""
    table = level_table(problem, allocation)[0]
    values = [level.nominal.number for unit in problem.units for level in unit.levels if level.nominal is not None]
    low, high = (min(values), max(values)) if values else (0.0, float(problem.sizes.max() - 1))
    shades = colormaps["viridis"](np.nan_to_num((table - low) / max(high - low, 1e-9)))[..., :3]
    return (255 * shades).astype(np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)
