"""The sources of Python's standard library, as code that every installation has."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from evosweep.core.errors import DataError
from evosweep.core.events import Progress
from evosweep.data.documents import Document
from evosweep.data.sections import normalize_line_ends

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip"}
MIN_CHARACTERS = 200


class PythonSources:
    """The modules of the standard library of the Python that runs, without its tests; another Python has others.

    Args:
        folder: Another folder of ``.py`` files; None: the standard library.
    """

    def __init__(self, *, folder: str | None = None) -> None:
        self.folder = Path(folder or sysconfig.get_path("stdlib"))

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return one document a module; the id is its path in the library.

        Raises:
            DataError: The folder has no Python file: an embedded Python keeps its library in an archive.
        """
        del progress
        found = []
        for path in sorted(self._files()):
            try:
                with tokenize.open(path) as file:  # in the encoding that the file declares
                    text = normalize_line_ends(file.read())
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if len(text) >= MIN_CHARACTERS:
                found.append(Document(f"python/{path.relative_to(self.folder).as_posix()}", text))
        if not found:
            raise DataError(f"data.folder: there is no Python source in {self.folder}; name a folder of .py files")
        return found

    def _files(self) -> Iterator[Path]:
        for folder, subfolders, names in os.walk(self.folder):
            subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
            yield from (Path(folder) / name for name in names if name.endswith(".py"))
