"""Figures over the searches of a multirun: convergence against tokens, size against quality."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evosweep.tracking.comparison import Row, entries


def convergence(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``convergence.png``, a panel a budget: validation KL against tokens; nothing where nothing searched."""
    found = entries(rows)
    budgets = list(dict.fromkeys(each.budget for each in found))
    if not any(len(row["history"]) > 1 for row in rows):
        return []
    figure = Figure(figsize=(5.2 * len(budgets), 3.8), layout="constrained")
    names = sorted({each.name for each in found})
    for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for each in (each for each in found if each.budget == budget):
            style: dict[str, Any] = {"color": f"C{names.index(each.name) % 10}"}
            for place, row in enumerate(each.rows):
                label = each.name if place == 0 else None
                points = [(step["tokens"], step["val_kl"]) for step in row["history"]]
                if len(points) == 1:
                    axis.axhline(points[0][1], linestyle=":", linewidth=1.2, label=label, **style)
                else:
                    axis.step(*zip(*points, strict=True), where="post", linewidth=1.4, label=label, **style)
        axis.set_title(budget)
        axis.set_xlabel("tokens scored")
        axis.set_ylabel("validation KL (nats/token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return [_saved(figure, folder / "convergence.png")]


def size_quality(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``size_quality.png``: validation PPL against true size, a line a sampler; nothing for a single budget."""
    found = entries(rows)
    if len({each.budget for each in found}) < 2:
        return []
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name in sorted({each.name for each in found}):
        mine = sorted((each.mean("bits_per_weight"), each.mean("val_ppl")) for each in found if each.name == name)
        axis.plot(*zip(*mine, strict=True), marker="o", markersize=4, label=name)
    axis.axhline(rows[0]["dense_ppl"], linestyle="--", linewidth=1, color="grey", label="dense")
    axis.set_xlabel("true bits per weight")
    axis.set_ylabel("validation PPL")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return [_saved(figure, folder / "size_quality.png")]


FIGURES = (convergence, size_quality)


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
