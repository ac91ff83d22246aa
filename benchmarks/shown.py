"""What a table of the results book shows: comparisons, sizes by domain and task, output of scripts; its stamp."""

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from itertools import groupby, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from evosweep import __version__
from evosweep.tracking import comparison
from evosweep.tracking.artifacts import compared
from evosweep.tracking.significance import BY_WINDOW, LEVEL, paired

Row = Mapping[str, Any]
VERSIONS = ("torch", "transformers", "optuna")
EXPLAINED = (
    f"Bold: lower than uniform at the same budget, paired t test over windows of text, p < {LEVEL}. ± is the standard "
    "deviation over seeds; of tasks, the standard error over questions. Seconds are the search's own, without what it "
    "measures before."
)
EXPLAINED_TASKS = f"Bold: differs from uniform at the same budget, McNemar's exact test, first seed, p < {LEVEL}."
INK = "#e8e8e8"
TONES: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {
        "figure.facecolor": "#1e2129",
        "savefig.facecolor": "#1e2129",
        "axes.facecolor": "#1e2129",
        "legend.facecolor": "#1e2129",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    },
}


def machine() -> str:
    """Return the GPU, or the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def stamp() -> str:
    """Return machine, versions, commit and date in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    here = Path(__file__).parent
    commit = subprocess.run(asked, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    commit = os.environ.get("BOOK_COMMIT", commit)  # of a copy without its history, on another machine
    return f"{machine()}; evosweep {__version__}, {versions}; commit {commit or 'unknown'}; {date.today().isoformat()}"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def sizes(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return a line a model, budget and sampler: KL and PPL on validation and every domain, mean accuracy, seconds.

    Figures are means over seeds, KL with its standard deviation. A KL in bold is lower than uniform's at the same
    budget by a paired t test over windows, each window's KL averaged over seeds.
    """
    del outputs
    rows = distinct(rows)
    texts = list(dict.fromkeys(text for row in rows for text in row.get("domains", {})))
    asked = any(row.get("tasks") for row in rows)
    head = [
        "model",
        "budget",
        "allocation",
        "seeds",
        "MB",
        "Wikipedia, KL / PPL",
        *(f"{text}, KL / PPL" for text in texts),
    ]
    lines = [[*head, *(["tasks, %"] if asked else []), "seconds"]]
    lines.append(["---"] * len(lines[0]))
    for model, found in _by_model(rows).items():
        lines.append(_dense(model, found[-1], texts, asked=asked))
        lines += [_line(entry, found, texts, asked=asked) for entry in comparison.entries(found)]
    parts = [_table(lines), EXPLAINED]
    for model, found in _by_model(rows).items():
        parts += [f"{model}:", winners(found)] if winners(found) else []
    return "\n\n".join([*parts, *([by_task(rows)] if asked else [])])


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(entry: comparison.Entry, rows: Sequence[Row], texts: Sequence[str], *, asked: bool) -> list[str]:
    """Return the cells of one sampler at one budget.

    Args:
        entry: Its results over seeds.
        rows: Results of the same model, the uniform ones among them.
        texts: Domains.
        asked: Whether there is a column of tasks.
    """
    members = entry.rows
    base = [row for row in rows if row["sampler"] == "uniform" and row["budget"] == entry.budget][:1]
    cells = [_model(members[0]), entry.budget, entry.name, str(len(members)), f"{entry.mean('size_mb'):.1f}"]
    cells += [_figures(members, base, text) for text in (None, *texts)]
    answered = [row for row in members if row.get("tasks")]
    if asked:
        found = [task["found"] for row in answered for task in row["tasks"].values()]
        cells.append(accuracy(found, len(answered)) if found else "")
    return [*cells, f"{entry.mean('seconds'):.0f}"]


def _dense(model: str, row: Row, texts: Sequence[str], *, asked: bool) -> list[str]:
    """Return the cells of a dense model, as one of its results has them."""
    domains = row.get("domains", {})
    cells = [model, "", "dense", "", f"{row['dense_size_mb']:.1f}", f"0 / {row['dense_ppl']:.2f}"]
    cells += [f"0 / {domains[text]['dense']['ppl']:.2f}" if text in domains else "" for text in texts]
    answers = [task["dense"] for task in row.get("tasks", {}).values()]
    return [*cells, *([accuracy(answers, 1) if answers else ""] if asked else []), ""]


def _figures(members: Sequence[Row], base: Sequence[Row], text: str | None) -> str:
    """Return mean KL with its standard deviation and PPL over seeds, the KL in bold where it is better than uniform's.

    Args:
        members: Results of one sampler at one budget.
        base: The uniform allocation's result; empty where there is none.
        text: Domain; None: the main validation text.
    """
    sides = [row if text is None else row["domains"][text]["found"] for row in members]
    found = [side["kl"] for side in sides]
    shown = f"{np.mean(found):.4f}"
    if base and members[0]["sampler"] != "uniform":
        other = base[0] if text is None else base[0]["domains"][text]["found"]
        test = paired(np.mean([side[BY_WINDOW] for side in sides], axis=0).tolist(), other[BY_WINDOW])
        shown = f"**{shown}**" if test.better else shown
    spread = f" ± {np.std(found, ddof=1):.4f}" if len(found) > 1 and np.ptp(found) > 0 else ""
    return f"{shown}{spread} / {np.mean([side['ppl'] for side in sides]):.2f}"


def by_task(rows: Sequence[Row]) -> str:
    """Return accuracies of every task: a line an allocation, means over seeds, with standard errors over questions.

    In bold is what differs from uniform at the same budget by McNemar's exact test on the first seed's answers.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.get("tasks", {})))
    lines = [["model", "budget", "allocation", *names], ["---"] * (3 + len(names))]
    for model, found in _by_model([row for row in rows if row.get("tasks")]).items():
        cells = [accuracy([found[0]["tasks"][name]["dense"]], 1) for name in names]
        lines.append([model, "", "dense", *cells])
        for entry in comparison.entries(found):
            lines.append([model, entry.budget, entry.name, *(_answers(entry.rows, name) for name in names)])
    return f"Accuracy in percent, by task:\n\n{_table(lines)}\n\n{EXPLAINED_TASKS}"


def _answers(rows: Sequence[Row], name: str) -> str:
    value = accuracy([row["tasks"][name]["found"] for row in rows], len(rows))
    _, p_value = rows[0]["tasks"][name].get("found_against_uniform", (0.0, 1.0))
    return f"**{value}**" if p_value < LEVEL else value


def accuracy(found: Sequence[Row], seeds: int) -> str:
    """Return the mean accuracy over tasks in percent, with the standard error over questions.

    Args:
        found: Accuracies of every task and seed.
        seeds: How many seeds they come from; these ask the same questions, so the error does not shrink with them.
    """
    mean = float(np.mean([one["accuracy"] for one in found]))
    tasks = len(found) // seeds
    error = float(np.sqrt(np.sum([one["stderr"] ** 2 for one in found]) / seeds)) / tasks
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def compared_rows(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return the comparison of samplers over seeds."""
    del outputs
    return comparison.markdown(rows)


def seeds(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return for every model the comparison of samplers over seeds, and who wins at each size."""
    del outputs
    parts = []
    for model, found in _by_model(distinct(rows)).items():
        table, _, explained = comparison.markdown(found).partition("\n\n")
        parts += [f"#### {model}", table, winners(found)]
    return "\n\n".join([*parts, f"{explained} Seconds are the search's own, without what it measures before."])


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Return rows without repetitions: of runs with the same settings and seeds, the first one."""
    found: dict[Any, Row] = {}
    for row in rows:
        settings = row.get("identity") or (_model(row), row["budget"], row["sampler"])
        found.setdefault((settings, row["seed"], row.get(comparison.CALIBRATION, 0)), row)
    return list(found.values())


def winners(rows: Sequence[Row]) -> str:
    """Return a sentence a budget: the sampler that is ahead of all others beyond noise, or those that none is ahead of.

    Args:
        rows: Results of one model.
    """
    lines = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        best, *others = [entry for entry in comparison.entries(rows) if entry.budget == budget]
        equal = [entry.name for entry in others if not comparison.verdict(entry, best).startswith("behind")]
        if others and not equal:
            lines.append(f"- {budget}: {best.name} is ahead of every other sampler.")
        elif others:
            lines.append(f"- {budget}: no winner; {', '.join([best.name, *equal])} are within noise of the best mean.")
    return "\n".join(lines)


def _model(row: Row) -> str:
    return str(row["run"].split()[0])


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_model(row), []).append(row)
    return groups


def printed(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return what scripts printed, tables as they are and anything else as text; JSON lines are left out."""
    del rows
    texts = ["\n".join(line for line in text.splitlines() if not line.startswith("{")).strip() for text in outputs]
    return "\n\n".join(text if "|---" in text else f"```\n{text}\n```" for text in texts)


def json_lines(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return lines of JSON as tables, one for lines that follow each other with the same keys."""
    del rows
    found = [json.loads(line) for text in outputs for line in text.splitlines() if line.startswith("{")]
    tables = []
    for keys, lines in groupby(found, key=tuple):
        tables.append(
            _table([keys, ["---"] * len(keys), *([_cell(value) for value in line.values()] for line in lines)])
        )
    return "\n\n".join(tables)


def _cell(value: object) -> str:
    """Return a value of a JSON line in a table's cell."""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


SHOWN: dict[str, Callable[[Sequence[Row], Sequence[str]], str]] = {
    "comparison": compared_rows,
    "sizes": sizes,
    "seeds": seeds,
    "output": printed,
    "lines": json_lines,
}


def drawn(rows: Sequence[Row], wanted: Sequence[str], folder: Path, *, name: str) -> list[tuple[str, str]]:
    """Draw figures of every model for a light and a dark page; return (tone, file name) of each.

    Args:
        rows: Results.
        wanted: Names of functions that draw comparisons: convergence, size_quality, standings.
        folder: Where they are written.
        name: Of the table, the files' first word.
    """
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    models = _by_model(rows)
    for figure, (model, found) in product(wanted, models.items()):
        first = f"{name}-{figure}" + (f"-{model}" if len(models) > 1 else "")
        for tone, settings in TONES.items():
            with mpl.rc_context(settings), tempfile.TemporaryDirectory() as temporary:
                for path in getattr(compared, figure)(found, Path(temporary)):
                    (folder / f"{first}-{tone}.png").write_bytes(path.read_bytes())
                    made.append((tone, f"{first}-{tone}.png"))
    return made
