"""Makes the tables and figures of docs/results.md again, from their configurations.

    python -m benchmarks.results --machine cpu|gpu [--only NAME ...] [--jobs N] [--again] [--list] [--draw]
    python -m benchmarks.results --only NAME --from FOLDER

One file of benchmarks/tables/ is one table: its commands, and how what they leave is shown. A command that is over is
not run again while it reads the same, and one that was cut short goes on where it was; ``--again`` runs all of those
named anew. ``--jobs`` runs so many commands at a time, spread over the GPUs that are there. ``--draw`` runs nothing and
writes the tables of what is there. Runs are kept in ``results/<table>/``, tables in benchmarks/book/, figures in
docs/figures/book/.

``--from`` reads a table's runs from another folder, as brought back from another machine: its ``results/<table>``, or
any folder with finished runs below it. What is there is shown, whether or not all is.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.shown import SHOWN, drawn, stamp
from evosweep.core.errors import EvosweepError, did_you_mean
from evosweep.core.files import digest, write_json, write_text
from evosweep.core.results import RESULT, read_result

HERE = Path(__file__).parent
TABLES = HERE / "tables"
BOOK = HERE / "book"
PAGE = HERE.parent / "docs" / "results.md"
FIGURES = PAGE.parent / "figures" / "book"
KEPT = Path("results")
QUIET = ("tracking=none", "storage=memory", "export=none", "report=none")
KEYS = {"title", "machine", "about", "commands", "each", "rows", "show", "figures"}
STAMP = "stamp.json"  # of a command: written when it begins
DONE = "done.json"  # when it is over
BEGIN = "<!-- tables: written by benchmarks/results.py -->"
END = "<!-- end of tables -->"


def read_table(path: Path) -> dict[str, Any]:
    """Return the description of a table; raises EvosweepError where it is none."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or set(table) - KEYS or not {"title", "machine", "commands", "show"} <= set(table):
        optional = ", ".join(sorted(KEYS - {"title", "machine", "commands", "show"}))
        raise EvosweepError(f"{path} must have title, machine, commands and show, may have {optional}")
    if table["show"] not in SHOWN or table["machine"] not in ("cpu", "gpu"):
        raise EvosweepError(f"{path}: show must be one of {', '.join(SHOWN)}, and machine cpu or gpu")
    return table


def commands_of(table: Mapping[str, Any]) -> list[str]:
    """Return the commands of a table: each of its patterns with every combination of the values in ``each``."""
    each = table.get("each", {})
    found = list(table["commands"])
    for name, values in each.items():
        found = [command.replace(f"{{{name}}}", str(value)) for command in found for value in values]
    return list(dict.fromkeys(found))


def run(command: str, folder: Path, *, again: bool, card: int | None = None) -> None:
    """Run one command of a table in a folder of its own, unless it is over already.

    Args:
        command: ``evosweep ...`` or ``benchmarks/<script>.py ...``.
        folder: Where its runs and output are kept.
        again: Whether to run it though it is over.
        card: The GPU that it sees; None: all.

    Raises:
        EvosweepError: It failed; its output is in the folder.
    """
    key = digest([command])
    if not again and _read(folder / DONE).get("command") == key:
        return
    goes_on = not again and _read(folder / STAMP).get("command") == key and (folder / "launch.json").is_file()
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / STAMP, {"command": key, "text": command, "stamp": stamp()})
    words = shlex.split(command)
    if words[0] == "evosweep":
        words = ["-m", "evosweep", *words[1:], *QUIET, f"hydra.sweep.dir={folder}", f"hydra.run.dir={folder / 'run'}"]
        words += [f"resume={folder}"] if goes_on else []
    began = time.monotonic()
    print(f"{folder.parent.name}: {command}", flush=True)
    seen = {} if card is None else {"CUDA_VISIBLE_DEVICES": str(card)}
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, check=False, env=os.environ | seen
        )
    if done.returncode:
        last = (folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        where = folder / "output.txt"
        raise EvosweepError(f"{command} ended with {done.returncode}: {' '.join(last)} (all of it: {where})")
    write_json(folder / DONE, {"command": key, "seconds": round(time.monotonic() - began, 1), "stamp": stamp()})


def run_all(tables: Mapping[str, Mapping[str, Any]], *, again: bool, jobs: int) -> list[EvosweepError]:
    """Run the commands of tables, several at a time; return what went wrong, when all the others are over.

    Args:
        tables: Name -> description.
        again: Whether to run what is over.
        jobs: Commands at a time; they take the GPUs in turn.
    """
    cards = torch.cuda.device_count() if jobs > 1 else 0
    wanted = [
        (command, KEPT.absolute() / name / str(index))
        for name, table in tables.items()
        for index, command in enumerate(commands_of(table))
    ]

    def one(number: int) -> EvosweepError | None:
        command, folder = wanted[number]
        try:
            run(command, folder, again=again, card=number % cards if cards else None)
        except EvosweepError as error:
            return error
        return None

    with ThreadPoolExecutor(jobs) as pool:
        return [error for error in pool.map(one, range(len(wanted))) if error is not None]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write(name: str, table: Mapping[str, Any], *, source: Path | None = None) -> None:
    """Write a table's Markdown and figures from what its commands left; nothing where nothing is there.

    Args:
        name: Of the table.
        table: Its description.
        source: Folder of its runs; None: where they are kept, and then nothing is written before all are over.

    Raises:
        EvosweepError: No finished run is in ``source``.
    """
    folder = source or KEPT.absolute() / name
    commands = commands_of(table)
    over = [_read(path) for path in sorted(folder.rglob(DONE))]
    if source is None and not all((folder / str(index) / DONE).is_file() for index in range(len(commands))):
        return
    rows = [read_result(path) for path in sorted(folder.rglob(RESULT))]
    rows += [read_result(path) for other in table.get("rows", []) for path in _beside(folder, other)]
    outputs = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("output.txt"))]
    if not rows and not outputs:
        raise EvosweepError(f"there is neither a {RESULT} nor an output.txt in {folder}")
    pictures = drawn(rows, table.get("figures", []), FIGURES, name=name)
    parts = [
        f"### {table['title']}",
        table.get("about", "").strip(),
        "```sh\n" + "\n".join(_typed(table)) + "\n```",
        SHOWN[table["show"]](rows, outputs),
        "\n".join(f"![{name}](figures/book/{picture}#only-{tone})" for tone, picture in pictures),
        _origin(folder, over, commands=len(commands)),
    ]
    write_text(BOOK / f"{name}.md", "\n\n".join(part for part in parts if part) + "\n")


def _beside(folder: Path, table: str) -> Iterable[Path]:
    """Return the results of another table, whose folder lies beside this one's."""
    return sorted((folder.parent / table).rglob(RESULT))


def _origin(folder: Path, over: Sequence[Mapping[str, Any]], *, commands: int) -> str:
    """Return machine, versions, commit and date, the seconds that commands took, and whether some are not over."""
    begun = [_read(path) for path in sorted(folder.rglob(STAMP))]
    stamps = list(dict.fromkeys(str(one["stamp"]) for one in [*over, *begun] if "stamp" in one))
    seconds = sum(float(one.get("seconds", 0)) for one in over)
    missing = "" if len(over) >= commands else f"; {len(over)} of {commands} commands over"
    return f"*{' / '.join(stamps) or 'machine and versions not recorded'}; {seconds:.0f} s{missing}.*"


def _typed(table: Mapping[str, Any]) -> list[str]:
    """Return the first commands that a reader would type, and which other values stand in for theirs."""
    each = table.get("each", {})
    first = commands_of({**table, "each": {name: values[:1] for name, values in each.items()}})
    lines = ["python " + ("-m " if command.startswith("evosweep") else "") + command for command in first]
    return [*lines, *(f"# {name}: {', '.join(map(str, values))}" for name, values in each.items())]


def assemble(names: Sequence[str]) -> None:
    """Write the tables that are there into their part of the page, in the order of their files.

    Raises:
        EvosweepError: The page has no such part.
    """
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise EvosweepError(f"{PAGE} must have the lines {BEGIN!r} and {END!r}: tables stand between them")
    texts = [BOOK / f"{name}.md" for name in names]
    tables = "\n".join(text.read_text(encoding="utf-8") for text in texts if text.is_file())
    before, _, rest = page.partition(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    """Run and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=("cpu", "gpu"))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    try:
        _make(options)
    except EvosweepError as error:
        sys.exit(str(error))


def _make(options: argparse.Namespace) -> None:
    tables = {path.stem: read_table(path) for path in sorted(TABLES.glob("*.yaml"))}
    for name in options.only:
        if name not in tables:
            raise EvosweepError(f"there is no table {name!r}{did_you_mean(name, tables)}; --list shows all")
    if not (options.machine or options.only or options.list or options.draw):
        raise EvosweepError("say which tables: --machine cpu, --machine gpu or --only NAME; --list shows all")
    if options.source and len(options.only) != 1:
        raise EvosweepError("--from needs the name of the one table that its runs belong to: --only NAME")
    if options.list:
        for name, table in tables.items():
            print(f"{name:22} {table['machine']}  {len(commands_of(table)):3}  {table['title']}")
        return
    wanted = {
        name: table
        for name, table in tables.items()
        if (name in options.only if options.only else options.machine in (None, table["machine"]))
    }
    failed = []
    if not (options.draw or options.source):
        failed = run_all(wanted, again=options.again, jobs=options.jobs)
    for name, table in wanted.items():
        write(name, table, source=options.source)
    assemble(list(tables))
    if failed:
        raise EvosweepError("\n".join(map(str, failed)))


if __name__ == "__main__":
    main()
