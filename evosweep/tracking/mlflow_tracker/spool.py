"""Writes to MLflow as data, and the file in a run's folder that keeps those which are not delivered yet."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evosweep.core.errors import EvosweepError
from evosweep.core.files import json_safe, write_text
from evosweep.core.redact import redact

UNSENT = "tracking_unsent.jsonl"
OPEN = "open"  # kind of the write that makes a run
SUMMARY = "summary"  # kind of the write that ends a multirun's parent


@dataclass(frozen=True)
class Write:
    """One write to MLflow.

    Attributes:
        kind: What is done, a key of ``delivery.KINDS``.
        content: Its arguments, as JSON; files by path, texts and pictures inline.
        run: Id of the run; None is the run that the last ``open`` before it made.
    """

    kind: str
    content: Mapping[str, Any]
    run: str | None = None


class Spool:
    """File of the writes that MLflow has not taken, a line a write, in order.

    Args:
        folder: Of the run; None keeps nothing on disk.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / UNSENT

    def append(self, made: Iterable[Write]) -> None:
        """Add writes at the end; a disk that takes nothing costs only the copy of what memory has as well."""
        if self.path is None:
            return
        text = "".join(map(_line, made))
        if text:
            try:
                with self.path.open("a", encoding="utf-8") as handle:
                    handle.write(text)
            except OSError:
                self.path = None

    def replace(self, left: Iterable[Write]) -> Path | None:
        """Let the file hold exactly these writes, none where there are none; return it if it is there."""
        if self.path is None:
            return None
        text = "".join(map(_line, left))
        try:
            if text:
                return write_text(self.path, text)
            self.path.unlink(missing_ok=True)
        except OSError:
            pass
        return None

    def read(self) -> list[Write]:
        """Return the writes of the file; one that was cut short at the end is left out.

        Raises:
            EvosweepError: It is no such file.
        """
        if self.path is None or not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(Write(**json.loads(line)))
            except (ValueError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise EvosweepError(f"line {number} of {self.path} is no write to MLflow") from error
        return found


def _line(write: Write) -> str:
    return json.dumps(json_safe(redact(asdict(write))), ensure_ascii=False) + "\n"
