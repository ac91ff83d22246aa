import io

import pytest
from rich.console import Console

from evosweep.tracking.console import RichProgress, short_count, summary


def row(run: str, kl: float | None) -> dict:
    return {
        "run": run,
        "bits_per_weight": 3.297,
        "size_mb": 100.4,
        "sparsity": 0.0,
        "kl": kl,
        "ppl": None if kl is None else 36.123,
        "tokens": 9_000_000,
        "seconds": 12.6,
        "dense_ppl": 20.1,
        "dense_bits_per_weight": 16.0,
        "dense_size_mb": 269.1,
    }


def test_the_table_fits_80_columns_best_first() -> None:
    rows = [row("SmolLM2-135M owl as_uniform=3 s0", None), row("SmolLM2-135M evopress as_uniform=3 s0", 0.594)]
    page = Console(width=80, file=io.StringIO(), record=True)
    page.print(summary(rows, title="quickstart"))
    lines = [line for line in page.export_text().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80 and "quickstart SmolLM2-135M as_uniform=3 s0" in lines[0]
    names = [line.split()[0] for line in lines if line.split()[0] in ("dense", "evopress", "owl")]
    assert names == ["dense", "evopress", "owl"]
    assert "36.12" in page.export_text(clear=False) or any("36.12" in line and "9.00M" in line for line in lines)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (3840, "3840"), (52_340, "52.3k"), (200_000, "200k"), (9e6, "9.00M"), (1.5e9, "1.50G")],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert short_count(number) == text


def test_a_bar_over_tokens_ends_full_and_counts_tokens() -> None:
    progress = RichProgress()
    progress.console = Console(width=80, file=io.StringIO(), force_terminal=True)
    for index in progress.track(range(1000), description="search", tokens=200_000):
        progress.note({"generation": str(index)}, tokens=60_000 * (index + 1))
        if index == 2:
            break
    shown = progress.console.file.getvalue()
    assert "180k/" in shown and "/1000" not in shown


def test_the_file_that_dense_was_made_of_has_a_row_of_its_own() -> None:
    made_of = {"name": "Model.Q4_1.gguf", "size_mb": 98.4}
    page = Console(width=80, file=io.StringIO(), record=True)
    page.print(summary([{**row("evopress", 0.594), "source": made_of}], title="quickstart"))
    (line,) = [line for line in page.export_text().splitlines() if "its file" in line]
    assert line.split()[-3:] == ["98.4", "0.0000", "20.10"]
