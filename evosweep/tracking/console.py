"""What a user sees while it runs: one line a fact, bars with time left, one table at the end."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
NOTES = 5  # rows of the live table


def terminal() -> Console:
    """Return a console as wide as the terminal; where there is none, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


class _Bars(Progress):
    """Bars, and under them a table of what was done last."""

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
        self._where = ""

    def track(self, items: Sequence[T], *, description: str) -> Iterable[T]:
        """Yield ``items`` under a bar with time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with _Bars(*columns, console=self.console) as bars:
            bars.notes = deque(maxlen=NOTES)
            self._bars, self._where = bars, description
            try:
                yield from bars.track(items, total=len(items), description=description)
            finally:
                self._bars = None

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False)

    def note(self, values: Mapping[str, str]) -> None:
        """Add a row to the table under the bar; where there is no terminal, print a line."""
        if self.console.is_terminal:
            if self._bars is not None:
                self._bars.notes.append(values)
        else:
            self.say(f"{self._where}: " + ", ".join(f"{key} {value}" for key, value in values.items()))


COLUMNS = {
    "run": ("run", "{}"),
    "bits_per_weight": ("bits/weight", "{:.3f}"),
    "size_mb": ("MB", "{:.1f}"),
    "sparsity": ("removed", "{:.1%}"),
    "kl": ("val KL", "{:.4f}"),
    "ppl": ("val PPL", "{:.2f}"),
    "tokens": ("tokens scored", "{:,.0f}"),
    "seconds": ("seconds", "{:.0f}"),
    "mlflow_run": ("MLflow run", "{}"),
}


def summary(rows: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Return a table of results, best validation KL first, under the dense model."""
    table = Table(title=title)
    columns = {key: form for key, form in COLUMNS.items() if key != "sparsity" or any(row["sparsity"] for row in rows)}
    for key, (heading, _) in columns.items():
        number = key not in {"run", "mlflow_run"}
        table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    dense = {
        "run": "dense",
        "ppl": rows[0]["dense_ppl"],
        "bits_per_weight": rows[0]["dense_bits_per_weight"],
        "size_mb": rows[0]["dense_size_mb"],
        "kl": 0.0,
    }
    shared = set.intersection(*(set(row["overrides"]) for row in rows))
    own = [[each for each in row["overrides"] if each not in shared and not each.startswith("budget")] for row in rows]
    named = [{**row, "run": " ".join([row["run"], *words])} for row, words in zip(rows, own, strict=True)]
    for row in [dense, *sorted(named, key=lambda each: each["kl"])]:
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, (_, form) in columns.items()]
        table.add_row(*map(escape, cells))
    return table
