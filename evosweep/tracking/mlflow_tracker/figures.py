"""Which figures of a search MLflow gets: those of a generation, drawn as lines, and those of the result."""

from collections.abc import Mapping
from typing import Any

from evosweep.core.events import GenerationRecord
from evosweep.core.metrics import BITS_PER_WEIGHT, KL, PPL, SECONDS, SIZE_MB, SPARSITY, TOKENS
from evosweep.tracking.mlflow_tracker import writes

RESULTS = (KL, PPL, SIZE_MB, BITS_PER_WEIGHT, TOKENS, SECONDS)


def result_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the rounded figures of a result; the sparsity only where something is sparse."""
    shown = [*RESULTS, *([SPARSITY] if row.get(SPARSITY) else [])]
    return {key: writes.rounded(float(row[key])) for key in shown if row.get(key) is not None}


def tail_figures(tails: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the winner's percentiles of KL, flips and RMS shift on validation text."""
    found = tails.get("found", {})
    return {f"val/{name}": writes.rounded(figures["value"]) for name, figures in found.items() if name != KL}


def task_figures(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracies of the winner, the uniform allocation and the dense model, and the winner's mean share."""
    values = {
        f"tasks/{task}/{name}": writes.rounded(figures[name]["accuracy"])
        for task, figures in tasks.items()
        for name in ("dense", "uniform", "found")
    }
    dense = sum(figures["dense"]["accuracy"] for figures in tasks.values())
    if dense:
        values["tasks/recovery"] = writes.rounded(
            sum(figures["found"]["accuracy"] for figures in tasks.values()) / dense
        )
    return values


def domain_figures(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the winner's KL and perplexity on every further text, and those of the uniform allocation."""
    return {
        f"domains/{text}/{prefix}{name}": writes.rounded(figures[side][name])
        for text, figures in domains.items()
        for side, prefix in (("found", ""), ("uniform", "uniform_"))
        for name in (KL, PPL)
    }


def generation_figures(record: GenerationRecord) -> dict[str, float]:
    """Return the figures of a generation that are drawn as lines, none of them twice."""
    values: dict[str, float] = {
        f"val/{KL}": record.validation[KL],
        f"val/{PPL}": record.validation[PPL],
        "search/tokens": record.tokens,
        "search/tokens_saved": record.tokens_saved,
        "search/tokens_per_second": record.tokens_per_second,
        "search/units_changed": record.changed,
        f"search/{BITS_PER_WEIGHT}": record.bits_per_weight,
    }
    values |= {f"sampler/{key}": value for key, value in record.facts.items()}
    for index, stage in enumerate(record.stages):
        if stage.parent is None:
            values[f"stages/{index}_gain_over_median"] = stage.median - stage.best
        else:
            values[f"stages/{index}_gain_over_parent"] = stage.parent - stage.best
    return values
