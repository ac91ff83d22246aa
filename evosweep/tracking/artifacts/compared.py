"""Figures that compare the searches of a multirun: final KL, convergence by tokens, quality by size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evosweep.tracking.comparison import Row, entries
from evosweep.tracking.palette import DISTINCT

MARKERS = "osD^vPX*"


def convergence(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``convergence.png``, a panel a budget: validation KL against tokens; nothing where nothing searched."""
    found = entries(rows)
    budgets = list(dict.fromkeys(entry.budget for entry in found))
    if not any(len(row["history"]) > 1 for row in rows):
        return []
    figure = Figure(figsize=(5.2 * len(budgets), 3.8), layout="constrained")
    names = sorted({entry.name for entry in found})
    for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for entry in (entry for entry in found if entry.budget == budget):
            style: dict[str, Any] = {"color": DISTINCT[names.index(entry.name) % len(DISTINCT)]}
            for index, row in enumerate(entry.rows):
                label = entry.name if index == 0 else None
                points = [(step["tokens"], step["kl"]) for step in row["history"]]
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
    """Write ``size_quality.png``: every run by true size and validation KL, and the front of those that none beats.

    Nothing where all runs have one size.
    """
    if len({entry.budget for entry in entries(rows)}) < 2:
        return []
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    names = sorted({row["sampler"] for row in rows})
    for index, name in enumerate(names):
        mine = [row for row in rows if row["sampler"] == name]
        sizes = [row["size_mb"] for row in mine]
        marker = MARKERS[index % len(MARKERS)]
        colour = DISTINCT[index % len(DISTINCT)]
        axis.scatter(sizes, [row["kl"] for row in mine], s=22, marker=marker, color=colour, label=name)
    axis.step(*zip(*front(rows), strict=True), where="post", linewidth=1, color="grey", label="front", zorder=0)
    axis.set_xlabel("true size (MB)")
    axis.set_ylabel("validation KL (nats/token)")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return [_saved(figure, folder / "size_quality.png")]


def front(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return size and KL of the runs that no run of at most their size beats, smallest first."""
    found: list[tuple[float, float]] = []
    for size, kl in sorted((float(row["size_mb"]), float(row["kl"])) for row in rows):
        if not found or kl < found[-1][1]:
            found.append((size, kl))
    return found


def standings(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``standings.png``, a panel a budget: mean KL of each sampler, best on top, a dot a seed; none for one."""
    found = entries(rows)
    if len(found) < 2:
        return []
    budgets = list(dict.fromkeys(entry.budget for entry in found))
    most = max(sum(entry.budget == budget for entry in found) for budget in budgets)
    figure = Figure(figsize=(5.2 * len(budgets), 1.2 + 0.34 * most), layout="constrained")
    for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        mine = [entry for entry in found if entry.budget == budget]
        means = [entry.mean("kl") for entry in mine]
        axis.barh(range(len(mine)), means, color=[DISTINCT[0], *["0.65"] * (len(mine) - 1)])
        for index, entry in enumerate(mine):
            axis.plot(
                [row["kl"] for row in entry.rows], [index] * len(entry.rows), ".", color=DISTINCT[1], markersize=5
            )
            axis.text(means[index], index, f" {means[index]:.3f}", va="center", fontsize=8)
        axis.set_yticks(range(len(mine)), [entry.name for entry in mine])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(budget)
        axis.set_xlabel("validation KL (nats/token)")
    return [_saved(figure, folder / "standings.png")]


FIGURES = (convergence, size_quality, standings)


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
