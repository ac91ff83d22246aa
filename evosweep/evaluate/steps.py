"""The steps of a measurement, each kept on disk when it is done, so that a measurement that was killed goes on there.

What a step is (a token window, a unit, a backward pass) is the measurement's choice. Numbers are kept exactly, and put
together in the same order as without a stop, so the result has the same bits.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from evosweep.core.events import Progress
from evosweep.core.files import digest, write_text

T = TypeVar("T")
Numbers = npt.NDArray[np.float64]


class Steps:
    """What a measurement has found so far, step by step.

    Args:
        path: File that a line is added to for every step; its name holds the digest of everything that the numbers
            depend on. None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def run(
        self, items: Sequence[T], work: Callable[[T], Any], *, progress: Progress, description: str
    ) -> list[Numbers]:
        """Return what ``work`` gives for every item; what an earlier run has kept is not done again.

        Args:
            items: What is worked through, in an order that is always the same.
            work: Returns an item's numbers, shape (numbers,), or one number.
            progress: Shows how far it is.
            description: What it shows.
        """
        found = self._kept()[: len(items)]
        if found:
            progress.say(f"{description}: {len(found)} of {len(items)} steps were done before")
        for item in progress.track(items[len(found) :], description=description):
            found.append(np.atleast_1d(np.asarray(work(item), dtype=np.float64)))
            self._keep(len(found) - 1, found[-1], progress)
        return found

    def remove(self) -> None:
        """Remove the file: the measurement is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _kept(self) -> list[Numbers]:
        """Return the numbers of the steps in the file, as far as it is whole; what follows is cut off."""
        if self.path is None or not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        found: list[Numbers] = []
        for line in lines:
            values = _values(line, len(found))
            if values is None:
                write_text(self.path, "".join(lines[: len(found)]))
                break
            found.append(np.array(values, dtype=np.float64))
        return found

    def _keep(self, step: int, numbers: Numbers, progress: Progress) -> None:
        """Add a step to the file; a disk that cannot take it does not end the measurement."""
        if self.path is None:
            return
        values = numbers.tolist()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "values": values, "digest": digest(values)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            progress.say(f"the steps of this measurement are not kept: {error.strerror or error}: {self.path}")
            self.path = None


def _values(line: str, step: int) -> list[float] | None:
    """Return the numbers in a line of the file; None where it is not that step's, or damaged."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(value, dict) and line.endswith("\n") and value.get("step") == step
    values = value.get("values") if whole else None
    return values if isinstance(values, list) and value.get("digest") == digest(values) else None
