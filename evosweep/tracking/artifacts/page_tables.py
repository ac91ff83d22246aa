"""Tables of the report page: by domain, single tokens, tasks."""

import html
from collections.abc import Mapping, Sequence

from evosweep.core.events import SearchResult
from evosweep.tracking.significance import in_words

TAILS = {
    "kl": "mean KL",
    "kl_p50": "KL, median token",
    "kl_p90": "KL, 90th percentile",
    "kl_p99": "KL, 99th percentile",
    "kl_p99.9": "KL, 99.9th percentile",
    "flips": "tokens whose most probable successor changes",
    "rms_shift": "RMS change of the right token's probability",
}


def domains(result: SearchResult) -> list[str]:
    """Return a table of KL and perplexity on every further text."""
    if not result.domains:
        return []
    headings = ("text", "dense PPL", "uniform KL", "uniform PPL", "found KL", "found PPL", "against uniform")
    lines = []
    for name, figures in result.domains.items():
        cells = [name, f"{figures['dense']['ppl']:.2f}"]
        for side in ("uniform", "found"):
            cells += [f"{figures[side]['kl']:.4f}", f"{figures[side]['ppl']:.2f}"]
        lines.append([*cells, in_words(figures["against_uniform"])])
    note = "Neither compression nor search has seen these texts; the test is a paired t test over windows."
    return ["<h2>By domain</h2>", f"<p>{note}</p>", table(headings, lines)]


def tails(result: SearchResult) -> list[str]:
    """Return a table of what the mean KL hides, with 95 % intervals."""
    if not result.tails:
        return []
    lines = [
        [label, *(_interval(result.tails[which][name], share=name == "flips") for which in ("found", "uniform"))]
        for name, label in TAILS.items()
    ]
    note = "On validation text; in brackets 95 % intervals of a bootstrap over windows."
    return ["<h2>More than the mean</h2>", f"<p>{note}</p>", table(("", "found", "uniform"), lines)]


def _interval(figures: Mapping[str, float], *, share: bool) -> str:
    """Return a figure with its interval, a share in percent."""
    shown = [f"{100 * value:.1f} %" if share else f"{value:.4f}" for value in figures.values()]
    return shown[0] if len(shown) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def tasks(result: SearchResult) -> list[str]:
    """Return a table of accuracies with standard errors, in percent."""
    if not result.tasks:
        return []
    lines = []
    for name, figures in result.tasks.items():
        cells = [
            f"{100 * figures[key]['accuracy']:.1f} ± {100 * figures[key]['stderr']:.1f}"
            for key in ("dense", "uniform", "found")
        ]
        lines.append([name, *cells, f"{figures['found_against_uniform'][1]:.3f}"])
    headings = ("", "dense", "uniform", "found", "p against uniform")
    return ["<h2>Tasks</h2><p>Zero-shot accuracy in percent.</p>", table(headings, lines)]


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls by itself where the screen is narrow."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
