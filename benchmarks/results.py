"""Makes the tables and figures of docs/book.md again, from their configurations.

    python -m benchmarks.results --machine cpu|gpu [--only NAME ...] [--again] [--list] [--draw]

One file of benchmarks/tables/ is one table: its commands, and how what they leave is shown. A command that is over is
not run again while it reads the same; ``--again`` runs all of those named. ``--draw`` runs nothing and writes the
tables of what is there. Runs are kept in ``results/``, tables in benchmarks/book/, figures in docs/figures/book/.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.shown import SHOWN, drawn, stamp
from evosweep.core.errors import EvosweepError, did_you_mean
from evosweep.core.files import digest, write_json, write_text
from evosweep.core.results import RESULT, read_result

HERE = Path(__file__).parent
TABLES = HERE / "tables"
BOOK = HERE / "book"
PAGE = HERE.parent / "docs" / "book.md"
FIGURES = PAGE.parent / "figures" / "book"
KEPT = Path("results")
QUIET = ("tracking=none", "storage=memory", "export=none", "report=none")
KEYS = {"title", "machine", "about", "commands", "show", "figures"}
INTRO = """# Results book

Every table names the commands, the machine, the versions, the commit and the date that it comes from. `make results`
(GPU) and `make results-cpu` make them again; `python -m benchmarks.results --only NAME` makes one.
"""


def read_table(path: Path) -> dict[str, Any]:
    """Return the description of a table; raises EvosweepError where it is none."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or set(table) - KEYS or not {"title", "machine", "commands", "show"} <= set(table):
        raise EvosweepError(f"{path} must have title, machine, commands and show, may have about and figures")
    if table["show"] not in SHOWN or table["machine"] not in ("cpu", "gpu"):
        raise EvosweepError(f"{path}: show must be one of {', '.join(SHOWN)}, and machine cpu or gpu")
    return table


def run(command: str, folder: Path, *, again: bool) -> None:
    """Run one command of a table in a folder of its own, unless it is over already.

    Args:
        command: ``evosweep ...`` or ``benchmarks/<script>.py ...``.
        folder: Where its runs and output are kept.
        again: Whether to run it though it is over.

    Raises:
        EvosweepError: It failed; its output is in the folder.
    """
    done = folder / "done.json"
    key = digest([command])
    if not again and done.is_file() and json.loads(done.read_text(encoding="utf-8"))["command"] == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = shlex.split(command)
    if words[0] == "evosweep":
        words = ["-m", "evosweep", *words[1:], *QUIET, f"hydra.sweep.dir={folder}", f"hydra.run.dir={folder / 'run'}"]
    began = time.monotonic()
    print(f"{folder.parent.name}: {command}", flush=True)
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        code = subprocess.run([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = (folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise EvosweepError(f"{command} ended with {code}: {' '.join(last)} (all of it: {folder / 'output.txt'})")
    write_json(done, {"command": key, "seconds": round(time.monotonic() - began, 1), "stamp": stamp()})


def write(name: str, table: Mapping[str, Any]) -> None:
    """Write a table's Markdown and figures from what its commands left; nothing where one of them is not over."""
    folders = [KEPT.absolute() / name / str(index) for index in range(len(table["commands"]))]
    if not all((folder / "done.json").is_file() for folder in folders):
        return
    facts = [json.loads((folder / "done.json").read_text(encoding="utf-8")) for folder in folders]
    rows = [read_result(path) for folder in folders for path in sorted(folder.rglob(RESULT))]
    outputs = [(folder / "output.txt").read_text(encoding="utf-8") for folder in folders]
    pictures = drawn(rows, table.get("figures", []), FIGURES, name=name)
    parts = [
        f"## {table['title']}",
        table.get("about", "").strip(),
        "```sh\n" + "\n".join(_typed(command) for command in table["commands"]) + "\n```",
        SHOWN[table["show"]](rows, outputs),
        "\n".join(f"![{name}](figures/book/{picture}#only-{tone})" for tone, picture in pictures),
        f"*{facts[-1]['stamp']}; {sum(one['seconds'] for one in facts):.0f} s.*",
    ]
    write_text(BOOK / f"{name}.md", "\n\n".join(part for part in parts if part) + "\n")


def _typed(command: str) -> str:
    return "python " + ("-m " if command.startswith("evosweep") else "") + command


def assemble(names: Sequence[str]) -> None:
    """Write the page of all tables that are there, in the order of their files."""
    texts = [BOOK / f"{name}.md" for name in names]
    write_text(PAGE, "\n".join([INTRO, *(text.read_text(encoding="utf-8") for text in texts if text.is_file())]))


def main() -> None:
    """Run and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=("cpu", "gpu"))
    parser.add_argument("--only", nargs="+", default=[])
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
    for name, table in tables.items():
        wanted = name in options.only if options.only else options.machine in (None, table["machine"])
        if options.list:
            print(f"{name:16} {table['machine']}  {table['title']}")
        elif wanted:
            for index, command in enumerate(table["commands"] if not options.draw else ()):
                run(command, KEPT.absolute() / name / str(index), again=options.again)
            write(name, table)
    if not options.list:
        assemble(list(tables))


if __name__ == "__main__":
    main()
