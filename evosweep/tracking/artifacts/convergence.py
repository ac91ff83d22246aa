"""Figure: how the winner's validation figures fell with the tokens spent."""

from pathlib import Path

from matplotlib.figure import Figure

from evosweep.core.events import SearchResult


class Convergence:
    """Validation KL and perplexity of each generation's elite, over tokens scored."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``convergence.png``."""
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots(1, 2)
        tokens = [record.tokens for record in result.generations]
        labels = {"kl": "validation KL (nats/token)", "ppl": "validation PPL"}
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            values = [record.validation[key] for record in result.generations]
            axis.step(tokens, values, where="post", marker="o", markersize=3)
            axis.set_xlabel("tokens scored by the search")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[1].axhline(result.dense["ppl"], linestyle="--", linewidth=1, color="grey", label="dense")
        axes[1].legend()
        bits = result.problem.bits_per_weight(result.cost)
        figure.suptitle(f"{result.sampler}, seed {result.seed}: {bits:.3f} bits per weight")
        figure.savefig(folder / "convergence.png", dpi=120)
