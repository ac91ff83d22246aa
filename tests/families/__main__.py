"""Tries families of transformers, keeps what was found, and writes the table of docs/models.md.

``python -m tests.families llama mixtral`` prints what is found of each; without names all families are tried that the
file of rows does not have yet, and with ``--write`` the table is written from that file.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.families.configs import CAUSAL, families
from tests.families.table import markdown
from tests.families.trial import Row, try_family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> None:
    """Try the families that are named, or all, and say what was found of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--rows", type=Path, help="file to which rows are appended, one JSON a line")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no family is begun after so many")
    parser.add_argument("--write", action="store_true", help="write docs/models.md from the file of rows")
    asked = parser.parse_args()
    rows = _read(asked.rows)
    ends = time.monotonic() + asked.seconds
    quiet()
    for name in asked.family or [name for name in families() if name not in rows]:
        if time.monotonic() > ends:
            break
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = try_family(name, Path(folder), loader=families().get(name, CAUSAL))
        print(f"{_line(rows[name])}  [{time.monotonic() - began:.1f} s]", flush=True)
        if asked.rows:
            with asked.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(rows[name])) + "\n")
    if asked.write:
        PAGE.write_text(markdown([rows[name] for name in families() if name in rows]), encoding="utf-8")


def quiet() -> None:
    """Let one thread compute, and transformers say nothing."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()


def _read(path: Path | None) -> dict[str, Row]:
    """Return the rows of a file by family, the last of each."""
    if path is None or not path.is_file():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.family: row for row in rows}


def _line(row: Row) -> str:
    if row.unbuilt:
        return f"{row.family}: UNBUILT {row.unbuilt}"
    found = ", ".join(f"{name} {error:.1g}" for name, error in row.errors.items() if name not in row.faults)
    lines = [f"{row.family}: {row.units} units, {row.covered:.0%}{', whole' if row.whole else ''}, {found}"]
    lines += [f"FAULT {name}: {text}" for name, text in row.faults.items()]
    lines += [f"refused {name}: {text}" for name, text in row.refused.items()]
    return "\n    ".join(lines)


if __name__ == "__main__":
    main()
