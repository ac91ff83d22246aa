"""The command line, called in this process."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from joblib.externals.loky import get_reusable_executor

from evosweep.cli import main
from evosweep.cli.job import forget_bench
from evosweep.testing.tiny import WORDS

TINY = [
    "model=tiny",
    "data=text",
    "data.path=corpus.jsonl",
    "tokens.seq_len=64",
    "tokens.calibration=1024",
    "tokens.validation=512",
    "search.generations=2",
    "search.offspring=4",
    "search.stages=[{survivors:2,tokens:64},{survivors:1,tokens:128}]",
    "evaluate.sensitivity_tokens=64",
]


def write_corpus(folder: Path, documents: int = 40) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "corpus.jsonl"
    rows = ({"text": " ".join(rng.choice(WORDS, 100))} for _ in range(documents))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Work in a folder with a corpus and a cache of its own."""
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EVOSWEEP_CACHE", str(folder / "cache"))
        forget_bench()  # another test's jobs may have had the same settings, and another cache
        yield folder


def evosweep(*arguments: str) -> int:
    """Run ``python -m evosweep`` with arguments; return its exit code.

    A command is a process of its own: workers that an earlier one's launcher left here have its environment.
    """
    if any("joblib" in argument for argument in arguments):
        get_reusable_executor().shutdown(wait=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evosweep", *arguments])
        patch.setattr(main, "_failures", [])
        GlobalHydra.instance().clear()
        try:
            main.main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            GlobalHydra.instance().clear()
    return 0
