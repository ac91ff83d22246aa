"""The figure of the README from the studies that benchmarks/quant_3bit.py left.

python benchmarks/plot_quant_3bit.py studies/quant_3bit.journal docs/quant_3bit.png
"""

import sys

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evosweep.core.unit import Unit
from evosweep.tracking.study.record import ELITE
from evosweep.tracking.study.storage import Journal

EVOPRESS_SCRIPTS = {0: 46.53, 5: 39.3, 12: 36.0}


def main(source: str, target: str) -> None:
    """Draw convergence on the left, the best winner's levels on the right."""
    storage = Journal(path=source).open()
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
    results = [study.user_attrs["result"] for study in studies]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    for study, result in zip(studies, results, strict=True):
        if result["sampler"] == "evopress":
            elites = [trial for trial in study.trials if trial.user_attrs.get(ELITE)]
            steps = [trial.user_attrs["generation"] for trial in elites]
            values = [trial.user_attrs["val_ppl"] for trial in elites]
            left.step(steps, values, where="post", label=f"evopress, seed {result['seed']}")
        elif result["sampler"] in {"uniform", "ilp"}:
            left.axhline(
                result["ppl"],
                linestyle="--",
                linewidth=1,
                color={"uniform": "black"}.get(result["sampler"], "grey"),
                label=result["sampler"],
            )
    left.plot(*zip(*EVOPRESS_SCRIPTS.items(), strict=True), "x", color="tab:red", label="EvoPress's own scripts")
    left.set(xlabel="generation of 64 offspring", ylabel="held-out PPL")
    left.set_title("SmolLM2-135M, 3.297 true bits per weight")
    left.legend(fontsize=8)
    best = min(
        (s for s in studies if s.user_attrs["result"]["sampler"] == "evopress"),
        key=lambda study: study.user_attrs["result"]["ppl"],
    )
    draw_levels(right, best.user_attrs["winner"])
    figure.savefig(target, dpi=110)


def draw_levels(axis: Axes, winner: dict[str, str]) -> None:
    """Draw block x linear, coloured by bits."""
    units = [Unit(name, 1, int(name.split(".")[2]), ()) for name in winner]
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    table = np.zeros((len(kinds), 1 + max(unit.block for unit in units)))
    for unit in units:
        table[kinds.index(unit.kind), unit.block] = int(winner[unit.name].removesuffix("bit"))
    image = axis.imshow(table, cmap="viridis", aspect="auto")
    for (row, block), bits in np.ndenumerate(table):
        axis.text(block, row, f"{bits:g}", ha="center", va="center", fontsize=7, color="white")
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set(xlabel="block", title="bits of the winner")
    axis.figure.colorbar(image, ax=axis)


if __name__ == "__main__":
    main(*sys.argv[1:])
