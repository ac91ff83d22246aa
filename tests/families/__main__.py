"""Tries families of transformers and writes the table of docs/models.md."""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import transformers

from tests.families.configs import causal_families
from tests.families.trial import Row, try_family


def main() -> None:
    """Try the families that are named, or all, and say what was found of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*")
    names = parser.parse_args().family or causal_families()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            row = try_family(name, Path(folder))
        print(f"{_line(row)}  [{time.monotonic() - began:.1f} s]", flush=True)


def _line(row: Row) -> str:
    if row.unbuilt:
        return f"{row.family}: UNBUILT {row.unbuilt}"
    parts = [f"{row.family}: {row.units} units, {row.covered:.0%}"]
    parts += [f"{name} {error:.1g}" for name, error in row.errors.items() if name not in row.faults]
    parts += [f"FAULT {name}: {text}" for name, text in row.faults.items()]
    parts += [f"refused {name}: {text}" for name, text in row.refused.items()]
    return "\n    ".join([", ".join(parts[: 1 + len(row.errors)]), *parts[1 + len(row.errors) :]])


if __name__ == "__main__":
    main()
