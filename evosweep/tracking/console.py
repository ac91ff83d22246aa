"""Terminal output: lines, progress bars with time left, and the table of results."""

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from evosweep.core.latency import MILLISECONDS
from evosweep.core.metrics import BITS_PER_WEIGHT, KL, PPL, SECONDS, SIZE_MB, SPARSITY, TOKENS
from evosweep.core.second_budget import DEVICE
from evosweep.tracking.naming import distinct_names
from evosweep.tracking.significance import in_words

T = TypeVar("T")
NOTES = 5  # rows of the table that is redrawn
WIDTH = 80  # columns where the terminal's are not known


def terminal() -> Console:
    """Return a console as wide as the terminal; where there is none, of 80 columns or what ``COLUMNS`` says."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


class _Tokens(ProgressColumn):
    """Tokens spent of those that end the phase."""

    def render(self, task: Task) -> Text:
        """Return ``52.3k/200k tokens``."""
        return Text(f"{short_count(task.completed)}/{short_count(task.total or 0)} tokens")


class _Bars(Progress):
    """Progress bars with a table of the last items under them."""

    notes: deque[Mapping[str, str]]

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is drawn."""
        yield self.make_tasks_table(self.tasks)
        notes = getattr(self, "notes", ())
        if notes:
            table = Table(*notes[-1], box=None, padding=(0, 2), header_style="dim")
            for values in notes:
                table.add_row(*values.values())
            yield table


class RichProgress:
    """Progress in the terminal; where there is none, plain lines."""

    def __init__(self) -> None:
        self.console = terminal()
        self._bars: _Bars | None = None
        self._task: TaskID | None = None  # of the bar that counts tokens
        self._where = ""

    def track(self, items: Sequence[T], *, description: str, tokens: int | None = None) -> Iterable[T]:
        """Yield ``items`` under a bar with time left; where tokens end the phase, the bar counts those.

        Args:
            items: What is worked through.
            description: Shown beside the bar.
            tokens: Tokens that end the phase, if those do and not the items.
        """
        count: ProgressColumn = MofNCompleteColumn() if tokens is None else _Tokens()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            count,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with _Bars(*columns, console=self.console) as bars:
            bars.notes = deque(maxlen=NOTES)
            self._bars = bars
            self._where = description
            try:
                if tokens is None:
                    yield from bars.track(items, total=len(items), description=description)
                else:
                    self._task = bars.add_task(description, total=tokens)
                    yield from items
                    bars.update(self._task, total=max(bars.tasks[0].completed, 1))  # it may have ended before
            finally:
                self._bars = self._task = None

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False)

    def note(self, values: Mapping[str, str], *, tokens: int | None = None) -> None:
        """Add a row to the table under the bar; where there is no terminal, print a line."""
        if self._bars is not None and self._task is not None and tokens is not None:
            self._bars.update(self._task, completed=tokens)
        if self.console.is_terminal:
            if self._bars is not None:
                self._bars.notes.append(values)
        else:
            self.say(f"{self._where}: " + ", ".join(f"{key} {value}" for key, value in values.items()))


COLUMNS = {
    "run": ("run", "{}"),
    BITS_PER_WEIGHT: ("bits/weight", "{:.3f}"),
    SIZE_MB: ("MB", "{:.1f}"),
    SPARSITY: ("removed", "{:.1%}"),
    DEVICE: ("device MB", "{:.1f}"),
    MILLISECONDS: ("ms", "{:.3f}"),
    KL: ("val KL", "{:.4f}"),
    PPL: ("val PPL", "{:.2f}"),
    TOKENS: ("tokens", "{}"),
    SECONDS: ("seconds", "{:.0f}"),
}
OPTIONAL = (SPARSITY, DEVICE, MILLISECONDS)  # columns that are there where some row has a figure


def summary(rows: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Return a table of results that fits 80 columns, best validation KL first, under the dense model.

    Words that all runs' names share are left out; the title has them.
    """
    names = [str(row["run"]) for row in rows]
    words = distinct_names(names)
    shared = [word for word in names[0].split() if len(rows) > 1 and all(word in name.split() for name in names)]
    table = Table(title=" ".join([title, *(word for word in shared if word not in words[0].split())]), box=box.SIMPLE)
    columns = {key: form for key, form in COLUMNS.items() if key not in OPTIONAL or any(row.get(key) for row in rows)}
    for key, (heading, _) in columns.items():
        number = key != "run"
        table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    dense = {
        "run": "dense",
        PPL: rows[0]["dense_ppl"],
        BITS_PER_WEIGHT: rows[0]["dense_bits_per_weight"],
        SIZE_MB: rows[0]["dense_size_mb"],
        KL: rows[0].get("dense_kl", 0.0),
    }
    reference = [dense, *_source_file(rows[0])]
    named = [{**row, "run": name, TOKENS: short_count(row[TOKENS])} for row, name in zip(rows, words, strict=True)]
    for row in [*reference, *sorted(named, key=lambda line: float("inf") if line[KL] is None else line[KL])]:
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, (_, form) in columns.items()]
        table.add_row(*map(escape, cells))
    return table


def domain_table(domains: Mapping[str, Mapping[str, Any]], *, name: str) -> Table:
    """Return a table of KL and perplexity by domain: dense model, uniform allocation, and a result.

    Args:
        domains: ``domains`` of a result.
        name: Of the result.
    """
    table = Table(title=f"by domain: {name}", box=box.SIMPLE)
    for heading in ("text", "dense PPL", "uniform KL", "PPL", "found KL", "PPL", "against uniform"):
        table.add_column(heading, justify="left" if heading in ("text", "against uniform") else "right")
    for text, figures in domains.items():
        cells = [f"{figures['dense']['ppl']:.2f}"]
        for side in ("uniform", "found"):
            cells += [f"{figures[side]['kl']:.4f}", f"{figures[side]['ppl']:.2f}"]
        table.add_row(escape(text), *cells, in_words(figures["against_uniform"]))
    return table


def _source_file(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for the quantized file that the dense model was made of, if it was."""
    source = row.get("source")
    if not source:
        return []
    return [{"run": "dense, its file", SIZE_MB: source["size_mb"], KL: 0.0, PPL: row["dense_ppl"]}]


def short_count(number: float) -> str:
    """Return a count in at most five characters: ``3840``, ``52.3k``, ``9.00M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            scaled = number / (1e3 if unit == "k" else limit)
            return f"{scaled:.3g}{unit}" if scaled >= 100 else f"{scaled:#.3g}{unit}"
    return f"{number:.0f}"
