"""The report page of a search: result, figures, settings, the command that repeats it, code that loads the export."""

import base64
import html
from pathlib import Path

from evosweep.core.events import SearchResult
from evosweep.tracking.artifacts.page_tables import domains, tails, tasks
from evosweep.tracking.artifacts.page_text import coloured, continuations
from evosweep.tracking.describe import selection
from evosweep.tracking.significance import found_sentences

FIGURES = {
    "allocation": (
        "Allocation",
        "The level of every layer; blocks from left to right. Below it, how sensitive a layer is: how much its output "
        "changes at the level that the uniform allocation has.",
    ),
    "convergence": (
        "Search",
        "KL from the dense model and perplexity on held-out text, a point a generation. The star is what was exported. "
        "Held-out text never selects, so the curve may rise.",
    ),
    "stages": (
        "Stages",
        "Left: offspring scored in each stage of a generation. Right: the rank that the best of the last stage had in "
        "the stages before. Right of the dashed line it would have been dropped: bars near the line mean that others "
        "as good were dropped by chance, and that the stage wants more tokens or more survivors.",
    ),
    "spending": (
        "What the budget was spent on",
        "True bits a weight by depth and by kind of layer; the uniform allocation for comparison.",
    ),
    "domains": (
        "KL by domain",
        "KL from the dense model on further texts, which neither compression nor search has seen; less is better.",
    ),
    "additivity": (
        "Do layer errors add up?",
        "A point an offspring: its loss in the first stage against the sum of its layers' errors, both less their mean "
        "over the generation. The closer to a rising line, the more a method that adds up layer errors can know.",
    ),
    "controls": (
        "What each kind of decision gains",
        "KL of the winner, of the winner with one kind of decision made uniform, and of the uniform "
        "allocation; less is better.",
    ),
    "front": (
        "Size against quality",
        "The allocations that none beats in both size and loss; right, the hypervolume under them by generation.",
    ),
}  # what stands over and under each figure; in the order in which they are read
HEAD = (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    "<meta name=color-scheme content='light dark'>"
)
STYLE = (
    ":root{--ink:#222;--page:#fff;--line:#ddd;--code:#f5f5f5;--quiet:#555}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e4e4e4;--page:#16181d;--line:#3a3f4a;--code:#22262e;--quiet:#aab}}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);"
    "background:var(--page)}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid var(--line);text-align:right}"
    ".wide{overflow-x:auto}.tokens{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px}"
    "td:first-child,th:first-child{text-align:left}"
    "figure{margin:0;overflow-x:auto}img{max-width:100%;background:#fff;border-radius:4px}"
    "figcaption{color:var(--quiet);margin:.3rem 0 .6rem;max-width:46rem;position:sticky;left:0}"
    "pre{background:var(--code);padding:1rem;white-space:pre-wrap;overflow-wrap:anywhere}"
    "@media(max-width:700px){td,th{padding:.2rem .4rem}figure img{max-width:none;width:42rem}}"
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
            *(f"<p>{html.escape(sentence)}</p>" for sentence in found_sentences(result.sampler, result.against)),
            f"<p>{html.escape(selection(result))}</p>",
            *(_figure(path) for path in _figures(folder)),
            *domains(result),
            *tails(result),
            *tasks(result),
            *coloured(result),
            *continuations(result),
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
        title = html.escape(f"{result.sampler}, seed {result.seed} - evosweep")
        page = f"{HEAD}<title>{title}</title><style>{STYLE}</style>"
        (folder / "report.html").write_text(page + "".join(blocks) + "</html>", encoding="utf-8")


def _figures(folder: Path) -> list[Path]:
    """Return the figures beside the page in the order in which they are read, unknown ones last."""
    order = list(FIGURES)
    return sorted(
        folder.glob("*.png"),
        key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem),
    )


def _figure(path: Path) -> str:
    """Return a figure under its heading, with what it shows; on a narrow screen it scrolls and stays readable."""
    heading, caption = FIGURES.get(path.stem, (path.stem.replace("_", " "), ""))
    data = base64.b64encode(path.read_bytes()).decode()
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
    return f"<h2>{html.escape(heading)}</h2><figure>{under}{image}</figure>"


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
    return "<div class=wide><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _loading(result: SearchResult, run: Path) -> str:
    if result.export:
        load = result.export.get("load")
        return f"folder = '{run}/model'\n\n{load}" if load else f"# {result.export['how_to_load']}"
    return f"# not exported; the allocation is in {run}/allocation.json:\n# sampler.start={run}/allocation.json"


def _code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
