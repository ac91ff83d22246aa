"""What a table of the results book shows: comparisons, sizes by domain and task, output of scripts; its stamp."""

import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
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
    return f"{machine()}; evosweep {__version__}, {versions}; commit {commit or 'unknown'}; {date.today().isoformat()}"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def sizes(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return a line a budget and sampler: KL and PPL on validation and every domain, mean accuracy with its error.

    Figures are means over seeds. A KL in bold is lower than uniform's at the same budget by a paired t test over
    windows, each window's KL averaged over seeds.
    """
    del outputs
    texts = list(rows[0].get("domains", {}))
    asked = bool(rows[0].get("tasks"))
    head = ["model", "budget", "allocation", "seeds", "MB", "KL / PPL", *texts, *(["tasks, %"] if asked else [])]
    lines = [head, ["---"] * len(head)]
    for members in _groups(rows).values():
        first = members[0]
        base = [one for one in rows if one["sampler"] == "uniform" and _comparable(one, first)][:1]
        cells = [first["run"].split()[0], first["budget"], first["sampler"], str(len(members))]
        cells.append(f"{np.mean([row['size_mb'] for row in members]):.1f}")
        cells += [_figures(members, base, text) for text in (None, *texts)]
        if asked:
            cells.append(accuracy([task["found"] for row in members for task in row["tasks"].values()], len(members)))
        lines.append(cells)
    lines += _dense(rows, texts, asked=asked)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nBold: lower than uniform at the same budget, paired t test over windows, p < {LEVEL}."


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["run"].split()[0], row["budget"], row["sampler"]), []).append(row)
    return groups


def _comparable(row: Row, other: Row) -> bool:
    return bool(row["budget"] == other["budget"] and row["text"] == other["text"])


def _figures(members: Sequence[Row], base: Sequence[Row], text: str | None) -> str:
    """Return mean KL and PPL over seeds on a text, the KL in bold where it is better than uniform's.

    Args:
        members: Results of one sampler at one budget.
        base: The uniform allocation's result; empty where there is none.
        text: Domain; None: the main validation text.
    """
    sides = [row if text is None else row["domains"][text]["found"] for row in members]
    kl = float(np.mean([side["kl"] for side in sides]))
    shown = f"{kl:.4f}"
    if base and members[0]["sampler"] != "uniform":
        other = base[0] if text is None else base[0]["domains"][text]["found"]
        test = paired(np.mean([side[BY_WINDOW] for side in sides], axis=0).tolist(), other[BY_WINDOW])
        shown = f"**{shown}**" if test.better else shown
    return f"{shown} / {np.mean([side['ppl'] for side in sides]):.2f}"


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


def _dense(rows: Sequence[Row], texts: Sequence[str], *, asked: bool) -> list[list[str]]:
    """Return a line for every dense model."""
    lines = []
    for model, row in {row["run"].split()[0]: row for row in rows}.items():
        cells = [model, "", "dense", "", f"{row['dense_size_mb']:.1f}", f"0 / {row['dense_ppl']:.2f}"]
        cells += [f"0 / {row['domains'][text]['dense']['ppl']:.2f}" for text in texts]
        lines.append([*cells, *([accuracy([task["dense"] for task in row["tasks"].values()], 1)] if asked else [])])
    return lines


def compared_rows(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return the comparison of samplers over seeds."""
    del outputs
    return comparison.markdown(rows)


def printed(rows: Sequence[Row], outputs: Sequence[str]) -> str:
    """Return what scripts printed, tables as they are and anything else as text."""
    del rows
    return "\n\n".join(text.strip() if "|---" in text else f"```\n{text.strip()}\n```" for text in outputs)


SHOWN: dict[str, Callable[[Sequence[Row], Sequence[str]], str]] = {
    "comparison": compared_rows,
    "sizes": sizes,
    "output": printed,
}


def drawn(rows: Sequence[Row], wanted: Sequence[str], folder: Path, *, name: str) -> list[tuple[str, str]]:
    """Draw figures for a light and a dark page; return (tone, file name) of each.

    Args:
        rows: Results.
        wanted: Names of functions that draw comparisons: convergence, size_quality, standings.
        folder: Where they are written.
        name: Of the table, the files' first word.
    """
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for figure in wanted:
        for tone, settings in TONES.items():
            with mpl.rc_context(settings), tempfile.TemporaryDirectory() as temporary:
                for path in getattr(compared, figure)(rows, Path(temporary)):
                    target = f"{name}-{figure}-{tone}.png"
                    (folder / target).write_bytes(path.read_bytes())
                    made.append((tone, target))
    return made
