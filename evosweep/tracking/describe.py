"""A search's result in words and tables: the notes of MLflow and Optuna Dashboard, the winner layer by layer."""

from collections import Counter
from typing import Any

from evosweep.core.events import SearchResult

MOST_LEVELS = 12  # a table of a ladder's hundreds of sparsities says less than none


def describe(result: SearchResult) -> str:
    """Return what was found, at what size, against what, with how much work, and what became of the layers."""
    row, first, levels = result.row(), result.generations[0].validation, _levels(result)
    lines = [
        f"**{result.sampler}**, seed {result.seed}: validation KL **{row['kl']:.4f}**, "
        f"PPL **{row['ppl']:.2f}** (dense {row['dense_ppl']:.2f}) at "
        f"**{row['bits_per_weight']:.3f} bits a weight**, {row['size_mb']:.1f} MB{_removed(row['sparsity'])}.",
        "",
        f"{len(result.generations) - 1} generations after the start (KL {first['kl']:.4f}, PPL {first['ppl']:.2f}), "
        f"{row['tokens']:,} tokens scored, {row['seconds']:.0f} s; ended: {result.stopped}.",
    ]
    if len(levels) > MOST_LEVELS:
        return "\n".join(lines)
    lines += ["", "| layer | " + " | ".join(levels) + " |", "|---" * (1 + len(levels)) + "|"]
    chosen: dict[str, Counter[str]] = {}
    for unit in result.problem.units:
        chosen.setdefault(unit.kind, Counter())[result.allocation[unit.name]] += 1
    lines += [
        f"| {kind} | " + " | ".join(str(counts.get(level, "")) for level in levels) + " |"
        for kind, counts in chosen.items()
    ]
    return "\n".join(lines)


def _removed(share: float) -> str:
    return f", {share:.1%} of the weights removed" if share else ""


def layer_table(result: SearchResult) -> dict[str, list[Any]]:
    """Return the winner as columns, a row a unit: where it is, its level, what that weighs and what it costs."""
    genome = result.problem.encode(result.allocation)
    alive, bits = result.problem.alive(genome), result.problem.prices(genome)
    columns: dict[str, list[Any]] = {
        key: [] for key in ("block", "layer", "level", "weights", "bits_per_weight", "relative_error", "name")
    }
    for place, unit in enumerate(result.problem.units):
        level = unit.levels[int(genome[place])]
        values = (
            unit.block,
            unit.kind,
            level.name if alive[place] else "dropped",
            unit.numel,
            float(bits[place]) / max(unit.numel, 1),
            level.relative_error,
            unit.name,
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def loading(code: str | None) -> str:
    """Return how a logged winner is loaded, or made again where only its recipe was kept.

    Args:
        code: Makes a ``model`` of a ``folder``; None where there is no folder.
    """
    if code:
        fetch = "import mlflow\n\nfolder = mlflow.artifacts.download_artifacts('models:/<the id of this model>')"
        return f"```python\n{fetch}\n{code}\n```"
    return (
        "The recipe: `allocation.json` says the level of every layer; the first line of `config.yaml` is the command "
        "that found it. To have the model itself, run that command with `sampler=evopress "
        "sampler.start=allocation.json search.generations=0 export=dense`, or log it with `tracking.model=weights`."
    )


def _levels(result: SearchResult) -> list[str]:
    """Return the names of all levels, cheapest first."""
    longest = max(result.problem.units, key=lambda unit: len(unit.levels))
    names = dict.fromkeys(longest.level_names)
    return list(names | dict.fromkeys(name for unit in result.problem.units for name in unit.level_names))
