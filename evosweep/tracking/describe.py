"""A search's result in a few lines of Markdown: what the notes of MLflow and Optuna Dashboard show."""

from collections import Counter

from evosweep.core.events import SearchResult

MOST_LEVELS = 12  # a table of a ladder's hundreds of sparsities says less than none


def describe(result: SearchResult) -> str:
    """Return what was found, at what size, against what, with how much work, and what became of the layers."""
    row, first, levels = result.row(), result.generations[0].validation, _levels(result)
    lines = [
        f"**{result.sampler}**, seed {result.seed}: validation KL **{row['val_kl']:.4f}**, "
        f"PPL **{row['val_ppl']:.2f}** (dense {row['dense_ppl']:.2f}) at "
        f"**{row['bits_per_weight']:.3f} bits a weight**, {row['megabytes']:.1f} MB.",
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


def _levels(result: SearchResult) -> list[str]:
    """Return the names of all levels, cheapest first."""
    longest = max(result.problem.units, key=lambda unit: len(unit.levels))
    names = dict.fromkeys(longest.level_names)
    return list(names | dict.fromkeys(name for unit in result.problem.units for name in unit.level_names))
