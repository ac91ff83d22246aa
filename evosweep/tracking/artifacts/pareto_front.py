"""Table and figure of a search of two objectives: the points of its front, size against quality."""

from pathlib import Path

from matplotlib.figure import Figure

from evosweep.core.events import SearchResult
from evosweep.core.files import json_safe, write_json
from evosweep.core.metrics import SIZE_MB

FRONT = "front.json"
COLUMNS = ("point", "bits_per_weight", "size_mb", "search_loss", "kl", "ppl")


class ParetoFront:
    """Points that no other dominates, the largest size first, and the hypervolume of every generation."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``front.json`` and ``front.png``; nothing where one size was searched."""
        if not result.front:
            return
        columns = [*COLUMNS, *([] if result.axis in COLUMNS else [result.axis])]
        data = [[point[key] for key in columns] for point in result.front]
        write_json(folder / FRONT, json_safe({"columns": columns, "data": data}))
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        sizes = [point[result.axis] for point in result.front]
        for key, label in (("search_loss", "on search text, by which it was chosen"), ("kl", "on validation text")):
            left.plot(sizes, [point[key] for point in result.front], marker="o", markersize=4, label=label)
        left.set_xlabel("megabytes" if result.axis == SIZE_MB else result.axis)
        left.set_ylabel("KL (nats/token)")
        left.set_yscale("log")
        left.grid(alpha=0.3)
        left.legend(fontsize=8)
        volumes = [(record.generation, record.facts.get("hypervolume")) for record in result.generations]
        right.plot(*zip(*[pair for pair in volumes if pair[1] is not None], strict=True))
        right.set_xlabel("generation")
        right.set_ylabel("hypervolume, each on its own tokens")
        right.grid(alpha=0.3)
        figure.savefig(folder / "front.png", dpi=120)
