"""Figures over the searches of a multirun: who stands where, convergence by tokens, quality by size."""

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
            for index, row in enumerate(each.rows):
                label = each.name if index == 0 else None
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
    if len({each.budget for each in found}) < 2:
        return []
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name in sorted({each.name for each in found}):
        mine = sorted((each.mean("bits_per_weight"), each.mean("ppl")) for each in found if each.name == name)
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
    budgets = list(dict.fromkeys(each.budget for each in found))
    most = max(sum(each.budget == budget for each in found) for budget in budgets)
    figure = Figure(figsize=(5.2 * len(budgets), 1.2 + 0.34 * most), layout="constrained")
    for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        mine = [each for each in found if each.budget == budget]
        means = [each.mean("kl") for each in mine]
        axis.barh(range(len(mine)), means, color=["C0", *["0.75"] * (len(mine) - 1)])
        for index, each in enumerate(mine):
            axis.plot([row["kl"] for row in each.rows], [index] * len(each.rows), "k.", markersize=4)
            axis.text(means[index], index, f" {means[index]:.3f}", va="center", fontsize=8)
        axis.set_yticks(range(len(mine)), [each.name for each in mine])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(budget)
        axis.set_xlabel("validation KL (nats/token)")
    return [_saved(figure, folder / "standings.png")]


FIGURES = (convergence, size_quality, standings)


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
