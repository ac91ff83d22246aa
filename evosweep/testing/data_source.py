"""Requirements of a document source."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Silent
from evosweep.data.documents import SPLITS, Document, DocumentSource, split_documents

_IN_ANOTHER_PROCESS = """
import functools, importlib, pathlib, sys
from evosweep.testing.data_source import fingerprint
module, name, folder = sys.argv[1:]
suite = functools.reduce(getattr, name.split("."), importlib.import_module(module))
print(fingerprint(suite().make(pathlib.Path(folder))))
"""


def fingerprint(source: DocumentSource) -> str:
    """Return a hash of all documents of a source, whatever their order."""
    documents = sorted(source.documents(progress=Silent()), key=lambda document: document.id)
    rows = [[document.id, document.text, [dict(message) for message in document.messages]] for document in documents]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


class DataSourceContract:
    """Test suite of document sources; subclass it at module level and implement ``make``."""

    def make(self, folder: Path) -> DocumentSource:
        """Return a source of at least three documents.

        Args:
            folder: Where the source finds its files. It is empty at first; a second call for the same folder, also
                from another process, must return an equal source.
        """
        raise NotImplementedError

    def broken(self, folder: Path) -> Mapping[str, DocumentSource]:
        """Return sources that cannot be read, by what is wrong with them.

        Args:
            folder: An empty folder for their files.
        """
        del folder
        return {}

    @pytest.fixture
    def documents(self, tmp_path: Path) -> list[Document]:
        """Return the documents of a source."""
        return self.make(tmp_path).documents(progress=Silent())

    def test_ids_are_unique_strings(self, documents: list[Document]) -> None:
        """Two documents of one id could put the same text into two splits."""
        ids = [document.id for document in documents]
        assert all(isinstance(name, str) and name for name in ids)
        assert len(set(ids)) == len(ids)

    def test_documents_have_text(self, documents: list[Document]) -> None:
        """Empty documents would count as documents and give no tokens."""
        assert all(isinstance(document.text, str) and document.text.strip() for document in documents)

    def test_there_are_enough_for_all_splits(self, documents: list[Document]) -> None:
        """Every split has documents, and no document is in two."""
        splits = split_documents(documents, shares=dict.fromkeys(SPLITS, 1 / len(SPLITS)))
        ids = [document.id for name in SPLITS for document in splits[name]]
        assert all(splits.values()) and sorted(ids) == sorted(document.id for document in documents)

    def test_reading_twice_gives_the_same(self, tmp_path: Path, documents: list[Document]) -> None:
        """A source has no state: the same object and an equal one give the same documents."""
        source = self.make(tmp_path)
        assert source.documents(progress=Silent()) == source.documents(progress=Silent()) == documents

    def test_paths_are_not_part_of_ids(self, tmp_path: Path, documents: list[Document]) -> None:
        """The same files in another folder, or on another machine, give the same splits."""
        other = tmp_path / "elsewhere"
        other.mkdir()
        assert self.make(other).documents(progress=Silent()) == documents

    def test_another_process_reads_the_same(self, tmp_path: Path) -> None:
        """Nothing depends on the process, such as Python's hashes of strings."""
        expected = fingerprint(self.make(tmp_path))
        suite = type(self)
        done = subprocess.run(
            [sys.executable, "-c", _IN_ANOTHER_PROCESS, suite.__module__, suite.__qualname__, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "123"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == expected

    def test_what_cannot_be_read_is_one_line(self, tmp_path: Path) -> None:
        """A user sees one line that says what to change, never a traceback."""
        for name, source in self.broken(tmp_path).items():
            with pytest.raises(EvosweepError) as caught:
                source.documents(progress=Silent())
            assert str(caught.value) and "\n" not in str(caught.value), name
