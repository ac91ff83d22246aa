"""Controls: which kind of decision a winner's gain over the uniform allocation comes from."""

from pathlib import Path

from matplotlib.figure import Figure

from evosweep.core.events import SearchResult
from evosweep.core.files import json_safe, write_json

EXPLAINED = (
    "The winner with one kind of decision made uniform, at no more bits, on validation text. share: how much of the "
    "winner's gain in KL over the uniform allocation is lost by that; shares need not add up to 1."
)


class Controls:
    """Table and figure of a winner's controls."""

    needs_controls = True

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``controls.json`` and ``controls.png``; nothing where there are no controls."""
        if not result.controls:
            return
        gain = result.controls["uniform"]["kl"] - result.controls["found"]["kl"]
        rows = {
            name: {**figures, "share": (figures["kl"] - result.controls["found"]["kl"]) / gain if gain else None}
            for name, figures in result.controls.items()
        }
        write_json(folder / "controls.json", {"explained": EXPLAINED, "controls": json_safe(rows)})
        figure = Figure(figsize=(6.4, 0.6 + 0.4 * len(rows)), layout="constrained")
        axis = figure.subplots()
        labels = [name if name in ("found", "uniform") else f"uniform {name}" for name in rows]
        axis.barh(labels, [figures["kl"] for figures in result.controls.values()], color="#4477aa")
        axis.invert_yaxis()
        axis.set_xlabel("validation KL (nats/token)")
        axis.set_title("winner, and with one kind of decision made uniform", fontsize=9)
        figure.savefig(folder / "controls.png", dpi=120)
