"""Figures: what the budget was spent on by depth and kind, and KL by domain, each against the uniform allocation."""

from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evosweep.core.events import SearchResult
from evosweep.core.problem import Genome, Problem
from evosweep.core.unit import Unit
from evosweep.tracking.palette import FOUND, UNIFORM


class Spending:
    """True bits a weight of every block and of every kind of layer, beside those of the uniform allocation."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``spending.png``."""
        problem = result.problem
        found = problem.encode(result.allocation)
        uniform = problem.uniform()
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        depth, kinds = figure.subplots(1, 2)
        for genome, name, colour, marker in ((uniform, "uniform", UNIFORM, "s"), (found, "found", FOUND, "o")):
            blocks = spent(problem, genome, lambda unit: unit.block)
            depth.plot(list(blocks), list(blocks.values()), color=colour, marker=marker, markersize=4, label=name)
        depth.set_xlabel("block")
        depth.xaxis.set_major_locator(MaxNLocator(integer=True))
        depth.set_ylabel("true bits a weight")
        depth.legend(fontsize=8, frameon=False)
        names = list(spent(problem, found, lambda unit: unit.kind))
        for offset, genome, colour in ((0.2, uniform, UNIFORM), (-0.2, found, FOUND)):
            bits = spent(problem, genome, lambda unit: unit.kind)
            kinds.barh(np.arange(len(names)) - offset, [bits[name] for name in names], height=0.4, color=colour)
        kinds.set_yticks(range(len(names)), names, fontsize=8)
        kinds.invert_yaxis()
        kinds.set_xlabel("true bits a weight")
        for axis in (depth, kinds):
            axis.grid(alpha=0.3)
        figure.savefig(folder / "spending.png", dpi=120)


def spent(problem: Problem, genome: Genome, group: Callable[[Unit], Hashable]) -> dict[Hashable, float]:
    """Return true bits a weight of every group of units, in the order in which groups first appear.

    Args:
        problem: Units and their levels.
        genome: Level of every unit, shape (units,).
        group: What a unit belongs to.
    """
    bits: dict[Hashable, float] = {}
    weights: dict[Hashable, int] = {}
    for unit, price in zip(problem.units, problem.prices(genome), strict=True):
        bits[group(unit)] = bits.get(group(unit), 0.0) + float(price)
        weights[group(unit)] = weights.get(group(unit), 0) + unit.numel
    return {key: bits[key] / max(weights[key], 1) for key in bits}


class DomainBars:
    """KL on every further text, beside that of the uniform allocation."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``domains.png``; nothing where there are no further texts."""
        if not result.domains:
            return
        names = list(result.domains)
        figure = Figure(figsize=(7, 1.2 + 0.5 * len(names)), layout="constrained")
        axis = figure.subplots()
        for offset, side, colour in ((0.2, "uniform", UNIFORM), (-0.2, "found", FOUND)):
            values = [result.domains[name][side]["kl"] for name in names]
            heights = np.arange(len(names)) - offset
            axis.barh(heights, values, height=0.4, color=colour, label=side)
            for value, height in zip(values, heights, strict=True):
                axis.text(value, height, f" {value:.3f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel("KL (nats/token)")
        axis.legend(fontsize=8, frameon=False)
        figure.savefig(folder / "domains.png", dpi=120)
