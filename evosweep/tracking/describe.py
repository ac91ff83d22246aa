"""Describes a result for the notes of MLflow and Optuna Dashboard, and lists the winner layer by layer."""

from collections import Counter
from typing import Any

from evosweep.core.events import SearchResult
from evosweep.tracking.palette import level_styles
from evosweep.tracking.significance import found_sentences, in_words

MOST_LEVELS = 12  # a table of a ladder's hundreds of sparsities says less than none


def describe(result: SearchResult) -> str:
    """Return a result in Markdown: figures, size, baselines, tokens and time, and the levels of the layers."""
    row = result.row()
    first = result.generations[0].validation
    levels = list(level_styles(result.problem))
    lines = [
        f"**{result.sampler}**, seed {result.seed}: validation KL **{row['kl']:.4f}**, "
        f"PPL **{row['ppl']:.2f}** (dense {row['dense_ppl']:.2f}) at "
        f"**{row['bits_per_weight']:.3f} bits a weight**, {row['size_mb']:.1f} MB{_removed(row['sparsity'])}.",
        "",
        f"{len(result.generations) - 1} generations after the start (KL {first['kl']:.4f}, PPL {first['ppl']:.2f}), "
        f"{row['tokens']:,} tokens scored, {row['seconds']:.0f} s; ended: {result.stopped}.",
        "",
        " ".join([*found_sentences(result.sampler, result.against), selection(result)]),
        *_by_domain(result),
        *_single_tokens(result),
        *_by_task(result),
    ]
    if len(levels) > MOST_LEVELS:
        return "\n".join(lines)
    lines += ["", "How many layers of each kind have which level:", ""]
    lines += ["| layer | " + " | ".join(levels) + " |", "|---" * (1 + len(levels)) + "|"]
    chosen: dict[str, Counter[str]] = {}
    for unit in result.problem.units:
        chosen.setdefault(unit.kind, Counter())[result.allocation[unit.name]] += 1
    lines += [
        f"| {kind} | " + " | ".join(str(counts.get(level, "")) for level in levels) + " |"
        for kind, counts in chosen.items()
    ]
    return "\n".join(lines)


def _by_domain(result: SearchResult) -> list[str]:
    """Return a table of KL and perplexity by domain in Markdown."""
    if not result.domains:
        return []
    lines = ["", "Further texts, which neither compression nor search has seen (paired t test over windows):", ""]
    lines += ["| text | dense PPL | uniform KL / PPL | found KL / PPL | against uniform |", "|---|---|---|---|---|"]
    for name, figures in result.domains.items():
        sides = [f"{figures[side]['kl']:.4f} / {figures[side]['ppl']:.2f}" for side in ("uniform", "found")]
        dense = f"{figures['dense']['ppl']:.2f}"
        lines.append(f"| {name} | {dense} | {' | '.join(sides)} | {in_words(figures['against_uniform'])} |")
    return lines


def _single_tokens(result: SearchResult) -> list[str]:
    """Return a sentence on what the mean KL hides."""
    if not result.tails:
        return []
    sides = [
        f"{name} {100 * figures['flips']['value']:.1f} % and {figures['kl_p99']['value']:.3f}"
        for name, figures in ((side, result.tails[side]) for side in ("found", "uniform"))
    ]
    return ["", f"Tokens whose most probable successor changes, and KL of the 99th percentile: {'; '.join(sides)}."]


def _by_task(result: SearchResult) -> list[str]:
    """Return a table of accuracies in percent with standard errors, in Markdown."""
    if not result.tasks:
        return []
    lines = ["", "Zero-shot accuracy, % (p: McNemar's exact test):", ""]
    lines += ["| task | questions | dense | uniform | found | p against uniform |", "|---|---|---|---|---|---|"]
    for name, figures in result.tasks.items():
        sides = [figures[side] for side in ("dense", "uniform", "found")]
        cells = [f"{100 * side['accuracy']:.1f} ± {100 * side['stderr']:.1f}" for side in sides]
        count = f"{figures['found']['questions']:,}"
        lines.append(f"| {name} | {count} | {' | '.join(cells)} | {figures['found_against_uniform'][1]:.2g} |")
    return lines


def _removed(share: float) -> str:
    return f", {share:.1%} of the weights removed" if share else ""


def layer_table(result: SearchResult) -> dict[str, list[Any]]:
    """Return the winner as columns, a row for each unit: block, layer, level, bits and error."""
    genome = result.problem.encode(result.allocation)
    alive = result.problem.alive(genome)
    bits = result.problem.prices(genome)
    columns: dict[str, list[Any]] = {
        key: [] for key in ("block", "layer", "level", "weights", "bits_per_weight", "relative_error", "name")
    }
    for index, unit in enumerate(result.problem.units):
        level = unit.levels[int(genome[index])]
        values = (
            unit.block,
            unit.kind,
            level.name if alive[index] else "dropped",
            unit.numel,
            float(bits[index]) / max(unit.numel, 1),
            level.relative_error,
            unit.name,
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def selection(result: SearchResult) -> str:
    """Return which generation the exported winner is from, and how that compares to the best validation KL seen."""
    winner = result.generations[result.winner_generation]
    best = min(result.generations, key=lambda record: (record.validation["kl"], record.generation))
    text = (
        f"Exported: the elite of generation {winner.generation}, chosen by its score on search tokens. "
        "Validation never selects"
    )
    if best.validation["kl"] < winner.validation["kl"]:
        return f"{text}: generation {best.generation} had a lower validation KL, {best.validation['kl']:.4f}."
    return f"{text}."
