"""Figure: which layer of which block got which level."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evosweep.core.events import SearchResult


class LevelHeatmap:
    """Blocks across, linears down, coloured by the winning level's nominal number."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``allocation.png``."""
        units = result.problem.units
        rows = list(dict.fromkeys(unit.kind for unit in units))
        blocks = sorted({unit.block for unit in units})
        table = np.full((len(rows), len(blocks)), np.nan)
        for unit in units:
            name = result.allocation[unit.name]
            place = unit.level_names.index(name)
            value = unit.levels[place].value
            table[rows.index(unit.kind), blocks.index(unit.block)] = (
                place if value is None else value
            )
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
