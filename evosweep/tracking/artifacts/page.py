"""The report page of a search: result, figures, settings, the command that repeats it, code that loads the export."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path

from evosweep.core.events import SearchResult
from evosweep.tracking.describe import selection

TAILS = {
    "kl": "mean KL",
    "kl_p50": "KL, median token",
    "kl_p90": "KL, 90th percentile",
    "kl_p99": "KL, 99th percentile",
    "kl_p99.9": "KL, 99.9th percentile",
    "flips": "tokens whose most probable successor changes",
    "rms_shift": "RMS change of the right token's probability",
}
ORDER = ("allocation", "convergence", "stages", "additivity")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:1rem;overflow:auto}"
)


class ReportPage:
    """Writes ``report.html``, one file that needs no network; it contains the figures in its folder."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``report.html``; the last of the artifacts, since it shows those before it."""
        run = folder.parent
        settings = run / "config.yaml"
        blocks = [
            f"<h1>{html.escape(result.sampler)}, seed {result.seed}</h1>",
            _table(result),
            f"<p>{html.escape(selection(result))}</p>",
            *(f"<h2>{path.stem.replace('_', ' ')}</h2>{_image(path)}" for path in _figures(folder)),
            *_tails(result),
            *_tasks(result),
            *_continuations(result),
            "<h2>Load it</h2>",
            _code(_loading(result, run)),
        ]
        if settings.exists():
            command, _, values = settings.read_text(encoding="utf-8").partition("\n")
            blocks += [
                "<h2>Get it again</h2>",
                _code(command.lstrip("# ")),
                "<details><summary>all settings</summary>",
                _code(values),
                "</details>",
            ]
        page = f"<!doctype html><html lang=en><meta charset=utf-8><title>evosweep</title><style>{STYLE}</style>"
        (folder / "report.html").write_text(page + "".join(blocks) + "</html>", encoding="utf-8")


def _figures(folder: Path) -> list[Path]:
    """Return the figures beside the page in the order in which they are read, unknown ones last."""
    return sorted(
        folder.glob("*.png"),
        key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem),
    )


def _table(result: SearchResult) -> str:
    row = result.row()
    start = result.generations[0].validation
    first = result.problem.encode(result.generations[0].elite)
    figures = [
        ("", "found", "start", "dense"),
        ("validation KL", f"{row['kl']:.4f}", f"{start['kl']:.4f}", "0"),
        ("validation PPL", f"{row['ppl']:.2f}", f"{start['ppl']:.2f}", f"{row['dense_ppl']:.2f}"),
        ("true bits a weight", f"{row['bits_per_weight']:.3f}", f"{result.generations[0].bits_per_weight:.3f}", ""),
        (
            "megabytes, embeddings included",
            f"{row['size_mb']:.1f}",
            f"{result.problem.megabytes(result.generations[0].cost):.1f}",
            "",
        ),
        ("weights removed", f"{row['sparsity']:.1%}", f"{result.problem.sparsity(first):.1%}", "0.0%"),
        ("tokens scored", f"{row['tokens']:,}", "", ""),
        ("seconds", f"{row['seconds']:.0f}", "", ""),
    ]
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in figures)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _tails(result: SearchResult) -> list[str]:
    """Return a table of what the mean KL hides, with 95 % intervals."""
    if not result.tails:
        return []
    head = "".join(f"<th>{cell}</th>" for cell in ("", "found", "uniform"))
    lines = []
    for name, label in TAILS.items():
        cells = [_interval(result.tails[which][name], share=name == "flips") for which in ("found", "uniform")]
        lines.append(f"<tr><td>{label}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    note = "On validation text; in brackets 95 % intervals of a bootstrap over windows."
    return ["<h2>More than the mean</h2>", f"<p>{note}</p>", f"<table><tr>{head}</tr>{''.join(lines)}</table>"]


def _interval(figures: Mapping[str, float], *, share: bool) -> str:
    """Return a figure with its interval, a share in percent."""
    shown = [f"{100 * value:.1f} %" if share else f"{value:.4f}" for value in figures.values()]
    return shown[0] if len(shown) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _tasks(result: SearchResult) -> list[str]:
    """Return a table of accuracies with standard errors, in percent."""
    if not result.tasks:
        return []
    head = "".join(f"<th>{cell}</th>" for cell in ("", "dense", "uniform", "found", "p against uniform"))
    lines = []
    for name, figures in result.tasks.items():
        cells = [
            f"{100 * figures[key]['accuracy']:.1f} ± {100 * figures[key]['stderr']:.1f}"
            for key in ("dense", "uniform", "found")
        ]
        cells.append(f"{figures['found_against_uniform'][1]:.3f}")
        lines.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return ["<h2>Tasks</h2><p>Zero-shot accuracy in percent.</p>", f"<table><tr>{head}</tr>{''.join(lines)}</table>"]


def _continuations(result: SearchResult) -> list[str]:
    """Return for each prompt a table of its continuations."""
    if not result.continuations:
        return []
    blocks = ["<h2>In its own words</h2><p>Greedy continuations; a sample to read, not a measurement.</p>"]
    for prompt, answers in result.continuations.items():
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in answers.items()
        )
        blocks.append(f"<h3>{html.escape(prompt)}</h3><table>{rows}</table>")
    return blocks


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _loading(result: SearchResult, run: Path) -> str:
    if result.export:
        load = result.export.get("load")
        return f"folder = '{run}/model'\n\n{load}" if load else f"# {result.export['how_to_load']}"
    return f"# not exported; the allocation is in {run}/allocation.json:\n# sampler.start={run}/allocation.json"


def _code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
