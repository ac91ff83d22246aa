"""The model card of an export: README.md with the hub's metadata, what the levels are, and how good they were."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from evosweep import __version__
from evosweep.core.files import write_text
from evosweep.core.problem import Genome, Problem
from evosweep.models.load import LoadedModel

CARD = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE_ID = re.compile(r"[a-z0-9.\-]+")
TAGS = ["evosweep", "mixed-precision", "model-compression"]
TEXT = "held-out text"


def write_card(folder: Path, body: str, *, genome: Genome, problem: Problem, store: str, loaded: LoadedModel) -> None:
    """Write the card with everything that is known of the levels; figures are added by ``with_figures``.

    Args:
        folder: Of the export.
        body: What the files are, and how they are loaded.
        genome: Level of every unit.
        problem: Units and their levels.
        store: Content address of the level store.
        loaded: The dense model.
    """
    base, license_id = origin(loaded)
    known = license_id if LICENSE_ID.fullmatch(license_id) else ""
    data = ModelCardData(
        model_name=f"{loaded.name} compressed with evosweep",
        base_model=base if HUB_ID.fullmatch(base) else None,
        base_model_relation="quantized" if HUB_ID.fullmatch(base) else None,
        license=known or ("other" if license_id else None),
        license_name=None if known or not license_id else license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    page = f"{body.rstrip()}\n\n{_levels(genome, problem)}\n{_origin_text(base or loaded.name, license_id, store)}"
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n{page}")


def with_figures(facts: Mapping[str, Any], row: Mapping[str, Any], *, command: str) -> dict[str, Any]:
    """Return an export's facts with its size after held-out figures, budget and command were added to its card.

    Args:
        facts: Of the export; without ``load`` it is no model, and has no card.
        row: Of ``result.json``: ``kl``, ``ppl``, ``dense_ppl``, and under ``uniform`` those of the uniform allocation.
        command: That made the run.
    """
    folder = Path(facts["path"])
    path = folder / CARD
    if "load" not in facts or not path.is_file():
        return dict(facts)
    row = {**row, **{key: row.get("finish", {}).get(f"{key}_after", row[key]) for key in ("kl", "ppl")}}
    card = ModelCard.load(path)
    card.data.eval_results = [_result(name, key, row) for key, name in (("ppl", "perplexity"), ("kl", "kl"))]
    metadata = card.data.to_yaml()
    write_text(path, f"---\n{metadata}\n---\n\n{card.text.strip()}\n\n{_figures(row)}\n{_made(row, command)}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {**facts, "bytes": size, "size_mb": round(size / 1e6, 3)}


def origin(loaded: LoadedModel) -> tuple[str, str]:
    """Return the hub id or name of the base model, and its licence; empty where they are not known.

    The licence is that of the base model's own card, in its folder or on the hub.

    Args:
        loaded: The dense model.
    """
    if loaded.base or loaded.license:
        return loaded.base, loaded.license
    config: Any = loaded.model.config
    path = str(getattr(config, "_name_or_path", ""))
    if Path(path).is_dir():
        data = _card_data(Path(path) / CARD)
        base = data.get("base_model") or ""
        return base if isinstance(base, str) else str(base[0]), str(data.get("license") or "")
    if not HUB_ID.fullmatch(path):
        return "", ""
    try:
        page = hf_hub_download(path, CARD)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError):
        return path, ""
    return path, str(_card_data(Path(page)).get("license") or "")


def _card_data(path: Path) -> dict[str, Any]:
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError):
        return {}


def _levels(genome: Genome, problem: Problem) -> str:
    """Return a table of levels: of how many units, and of what share of the weights."""
    names = [unit.levels[int(level)].name for unit, level in zip(problem.units, genome, strict=True)]
    weights: Counter[str] = Counter()
    for name, unit in zip(names, problem.units, strict=True):
        weights[name] += unit.numel
    total = sum(weights.values())
    rows = [
        f"| {name} | {count} | {100 * weights[name] / total:.1f} % |" for name, count in sorted(Counter(names).items())
    ]
    cost = problem.cost(genome)
    size = f"{problem.bits_per_weight(cost):.3f} bits a weight with scales, zeros and masks"
    return "\n".join(
        [
            "## Levels",
            "",
            f"{size}; {problem.megabytes(cost):.1f} MB with all that is not compressed.",
            "",
            "| level | units | of the weights |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _origin_text(base: str, license_id: str, store: str) -> str:
    terms = license_id or "not known here: see the base model"
    return (
        f"## Origin\n\n- base model: {base}\n- its licence: {terms}\n- level store: `{store}`\n"
        f"- made with evosweep {__version__}\n"
    )


def _figures(row: Mapping[str, Any]) -> str:
    """Return a table of dense model, uniform allocation and this one."""
    uniform = row.get("uniform") or {}
    dense = {"kl": 0.0, "ppl": row.get("dense_ppl"), "bits_per_weight": row.get("dense_bits_per_weight")}
    lines = [_line("dense", dense)]
    lines += [_line("uniform", uniform)] if uniform else []
    lines += [_line("this model", row)]
    return "\n".join(
        [
            "## Figures",
            "",
            "On text that neither the levels nor the search have seen; KL in nats a token from the dense model.",
            "",
            "| model | bits a weight | KL | perplexity |",
            "|---|---|---|---|",
            *lines,
            "",
        ]
    )


def _line(name: str, figures: Mapping[str, Any]) -> str:
    forms = {"bits_per_weight": ".3f", "kl": ".4f", "ppl": ".2f"}
    shown = ["" if figures.get(key) is None else f"{figures[key]:{form}}" for key, form in forms.items()]
    return f"| {name} | {' | '.join(shown)} |"


def _made(row: Mapping[str, Any], command: str) -> str:
    budget = f"Budget: {row['budget']}. " if row.get("budget") else ""
    return f"## Search\n\n{budget}The allocation was found by\n\n```\n{command}\n```\n"


def _result(metric: str, key: str, row: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=f"{TEXT} {str(row.get('text', ''))[:16]}".strip(),
        dataset_split="validation",
        metric_type=metric,
        metric_name="KL from the dense model, nats a token" if key == "kl" else "perplexity",
        metric_value=round(float(row[key]), 5),
    )
