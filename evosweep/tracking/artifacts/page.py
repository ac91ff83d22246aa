"""The report page of a search: result, figures, settings, the command that repeats it, code that loads the export."""

import base64
import html
from pathlib import Path

from evosweep.core.events import SearchResult
from evosweep.tracking.artifacts.page_tables import domains, tails, tasks
from evosweep.tracking.artifacts.page_text import coloured, continuations
from evosweep.tracking.describe import selection
from evosweep.tracking.significance import found_sentences

ORDER = ("allocation", "convergence", "stages", "spending", "domains", "additivity")
HEAD = (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    ".wide{overflow-x:auto}.tokens{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px}"
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
            *(f"<p>{html.escape(sentence)}</p>" for sentence in found_sentences(result.sampler, result.against)),
            f"<p>{html.escape(selection(result))}</p>",
            *(f"<h2>{path.stem.replace('_', ' ')}</h2>{_image(path)}" for path in _figures(folder)),
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
        page = f"{HEAD}<title>evosweep</title><style>{STYLE}</style>"
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
    return "<div class=wide><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


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
