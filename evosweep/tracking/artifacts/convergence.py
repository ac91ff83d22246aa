"""Figure: how the winner's validation figures fell with the tokens and the time spent."""

from pathlib import Path

from matplotlib.figure import Figure

from evosweep.core.events import SearchResult


class Convergence:
    """Validation KL of each generation's elite over tokens scored and over time, and its perplexity."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``convergence.png``."""
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        steps = result.history()
        winner = steps[result.winner_generation]
        labels = {
            "kl": "validation KL (nats/token)",
            "ppl": "validation PPL",
            "tokens": "tokens scored by the search",
            "seconds": "seconds",
        }
        panels = (("tokens", "kl"), ("seconds", "kl"), ("tokens", "ppl"))
        for axis, (spent, key) in zip(axes, panels, strict=True):
            axis.step(
                [step[spent] for step in steps], [step[key] for step in steps], where="post", marker="o", markersize=3
            )
            axis.plot([winner[spent]], [winner[key]], "r*", markersize=11, label="exported")
            axis.set_xlabel(labels[spent])
            axis.set_ylabel(labels[key])
            axis.grid(alpha=0.3)
        axes[2].axhline(result.dense["ppl"], linestyle="--", linewidth=1, color="grey", label="dense")
        for axis in axes:
            axis.legend(fontsize=8)
        bits = result.problem.bits_per_weight(result.cost)
        figure.suptitle(f"{result.sampler}, seed {result.seed}: {bits:.3f} bits per weight; validation never selects")
        figure.savefig(folder / "convergence.png", dpi=120)
