"""Figures that compare the searches of a multirun: final KL, convergence by tokens, quality by size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evosweep.tracking.comparison import Row, entries


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
            style: dict[str, Any] = {"color": f"C{names.index(entry.name) % 10}"}
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
    """Write ``size_quality.png``: validation PPL against true size, a line a sampler; nothing for a single budget."""
    found = entries(rows)
    if len({entry.budget for entry in found}) < 2:
        return []
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name in sorted({entry.name for entry in found}):
        mine = sorted((entry.mean("bits_per_weight"), entry.mean("ppl")) for entry in found if entry.name == name)
        axis.plot(*zip(*mine, strict=True), marker="o", markersize=4, label=name)
    axis.axhline(rows[0]["dense_ppl"], linestyle="--", linewidth=1, color="grey", label="dense")
    axis.set_xlabel("true bits per weight")
    axis.set_ylabel("validation PPL")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return [_saved(figure, folder / "size_quality.png")]


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
        axis.barh(range(len(mine)), means, color=["C0", *["0.75"] * (len(mine) - 1)])
        for index, entry in enumerate(mine):
            axis.plot([row["kl"] for row in entry.rows], [index] * len(entry.rows), "k.", markersize=4)
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
