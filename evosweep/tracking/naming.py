"""Names of runs, and the params shown beside them, the same in MLflow, Optuna and the console."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

PARAMS = ("model", "data", "compressor", "budget", "sampler", "fitness", "search", "seed")
NAMED = ("model", "sampler", "seed")  # settings that every run's name starts with; the budget is the fourth
LONGEST = 200  # characters of a run's name


def run_name(*, model: str, sampler: str, budget: str, seed: int, varied: Mapping[str, str] | None = None) -> str:
    """Return a run's name, unlike those of its multirun: ``{model} {sampler} {budget} s{seed}`` and what else varies.

    Args:
        model: Name of the model, or its path, of which the last part is used.
        sampler: Name of the sampler.
        budget: The budget as the user wrote it.
        seed: Of the search.
        varied: Settings that a multirun varies, by full path, with this run's values.
    """
    words = [PurePath(model).name or model, sampler, budget, f"s{seed}"]
    for path, value in (varied or {}).items():
        if path not in NAMED and path.split(".")[0] != "budget":
            words.append(f"{path.rsplit('.', 1)[-1]}={value}")
    return " ".join(words)[:LONGEST]


def run_params(
    *,
    choices: Mapping[str, str | None],
    model: str,
    budget: str,
    seed: int,
    varied: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the few settings that runs are compared by: the choices of ``PARAMS``, and what a multirun varies.

    The whole configuration is an artifact, ``config.yaml``. MLflow's pages stay readable with ten params, not with 120.

    Args:
        choices: Chosen file of every configuration group.
        model: Name of the model.
        budget: The budget as the user wrote it.
        seed: Of the search.
        varied: Settings that a multirun varies, by full path, with this run's values.
    """
    known = {**choices, "model": PurePath(model).name or model, "budget": budget, "seed": str(seed)}
    params = {key: str(known[key]) for key in PARAMS if known.get(key) is not None}
    for group in ("transform", "drop"):
        if known.get(group) not in (None, "none"):
            params[group] = str(known[group])
    added = {path: value for path, value in (varied or {}).items() if path.split(".")[0] not in {*params, "budget"}}
    nested = {path: value for path, value in (varied or {}).items() if "." in path and not path.startswith("budget")}
    return params | added | nested


def varied_values(overrides: Sequence[str], varied: Sequence[str]) -> dict[str, str]:
    """Return this job's values of the settings that its multirun varies.

    Args:
        overrides: ``path=value`` as typed for this job.
        varied: Full paths of the settings that have more than one value in the multirun.
    """
    values = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    return {path: values[path] for path in varied if path in values}


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return the names without the words that all of them share, for tables in which space is short.

    A name always keeps its second word, the sampler, and a single name stays whole.
    """
    words = [name.split() for name in names]
    shared = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [
        " ".join(word for index, word in enumerate(line) if index == 1 or word not in shared) or name
        for line, name in zip(words, names, strict=True)
    ]
