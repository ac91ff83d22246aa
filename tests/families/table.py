"""The table of docs/models.md: what was found of every family of transformers."""

from collections.abc import Sequence

import transformers

from tests.families.trial import Row

HEAD = """# Models

Every family that transformers {version} loads as a causal language model, or as a model of images and text, was tried:
a random model of four blocks with hidden size 64, in fp32, with biases and gains that are neither 0 nor 1. This page is
written by `python -m tests.families --rows rows.jsonl --write`; `python -m pytest -m families` tries all of them again.

| column | what was compared |
|---|---|
| units | layers with levels, of four blocks |
| covered | share of the weights of the blocks that units hold; below 95 % evosweep asks for `units.coverage` |
| scored | largest difference of token losses, of the largest loss: a population of mixed genomes (2 and 4 bits, 2:4, \
dropped parts) scored at once, and each of them swapped into the model's own forward; *whole*: the model runs as a \
whole, as its blocks cannot be run one by one |
| sub-blocks | how many parts of the four blocks can be dropped alone, with the same logits where there is noise in \
the weights that count as gone |
| blocks | each block dropped alone: scored, exported and loaded again |
| dense, packed | a mixed genome exported, loaded again and compared with the model's own forward |

**no**: refused with one line before any work; the reason stands below the table. {counts}

| family | units | covered | scored | sub-blocks | blocks | dense | packed |
|---|---|---|---|---|---|---|---|
"""
WHY = """
## What is refused, and why

| family | what | message |
|---|---|---|
"""
UNBUILT = """
## Not tried

These could not be made small from a config alone.

| family | reason |
|---|---|
"""


def markdown(rows: Sequence[Row]) -> str:
    """Return the page for rows in the order of the table."""
    built = [row for row in rows if not row.unbuilt]
    green = [row for row in built if row.green and "load" not in row.refused]
    refused = [row for row in built if row.green and "load" in row.refused]
    counts = (
        f"{len(green)} families are compressed, {len(refused)} are refused as they are loaded, "
        f"{len(built) - len(green) - len(refused)} are wrong, {len(rows) - len(built)} were not tried."
    )
    page = HEAD.format(version=transformers.__version__, counts=counts)
    page += "".join(_line(row) for row in built)
    reasons = [(row.family, what, text) for row in built for what, text in {**row.refused, **row.faults}.items()]
    page += WHY + "".join(f"| {family} | {what} | {_cell(text)} |\n" for family, what, text in reasons)
    missing = [row for row in rows if row.unbuilt]
    return page + (
        UNBUILT + "".join(f"| {row.family} | {_cell(row.unbuilt)} |\n" for row in missing) if missing else ""
    )


def _line(row: Row) -> str:
    if "load" in row.refused or "load" in row.faults:
        return f"| {row.family} | {'**wrong**' if row.faults else 'no'} | | | | | | |\n"
    scored = f"{max(row.errors.get('chain', 0.0), row.errors.get('scored', 0.0)):.0e}"
    cells = [
        str(row.units),
        f"{row.covered:.1%}",
        _mark(row, ("store", "chain", "scored"), scored + (" *whole*" if row.whole else "")),
        _mark(row, ("sub-blocks", "dropped", "removed"), str(row.parts)),
        _mark(row, ("blocks", "without blocks"), "yes"),
        _mark(row, ("dense",), "equal"),
        _mark(row, ("packed",), "equal"),
    ]
    return f"| {row.family} | {' | '.join(cells)} |\n"


def _mark(row: Row, steps: Sequence[str], text: str) -> str:
    if any(step in row.faults for step in steps):
        return "**wrong**"
    return "no" if any(step in row.refused for step in steps) else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:400]
