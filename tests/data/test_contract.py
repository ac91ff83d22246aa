"""The document sources that evosweep ships keep their contract."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import pytest

from evosweep.data.documents import DocumentSource
from evosweep.data.text import TextFiles
from evosweep.data.wikipedia import Wikipedia
from evosweep.testing import DataSourceContract

TEXTS = [f"Document {n} says little. " * 20 for n in range(7)]


class TestOneTxt(DataSourceContract):
    def make(self, folder: Path) -> DocumentSource:
        (folder / "book.txt").write_text("\n\n".join(TEXTS))
        return TextFiles(path=str(folder / "book.txt"))

    def broken(self, folder: Path) -> Mapping[str, DocumentSource]:
        (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
        (folder / "empty.txt").write_text("")
        os.mkfifo(folder / "pipe.txt")
        names = ("latin.txt", "empty.txt", "pipe.txt", "missing.txt", "x" * 300)
        return {name: TextFiles(path=str(folder / name)) for name in names}


class TestJsonLines(DataSourceContract):
    def make(self, folder: Path) -> DocumentSource:
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        return TextFiles(path=str(folder / "a.jsonl"))

    def broken(self, folder: Path) -> Mapping[str, DocumentSource]:
        contents = {
            "broken": '{"text": ',
            "nested": "[" * 100_000,
            "no object": "3\n",
            "other column": '{"body": "x"}\n',
            "other kind": '{"text": 3}\n',
            "empty": "",
        }
        for name, content in contents.items():
            (folder / f"{name}.jsonl").write_text(content)
        return {name: TextFiles(path=str(folder / f"{name}.jsonl")) for name in contents}


class TestConversations(DataSourceContract):
    def make(self, folder: Path) -> DocumentSource:
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": None}]} for text in TEXTS
        ]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TextFiles(path=str(folder / "a.jsonl"), column="messages", template="chat")


class TestFolderOfParquet(DataSourceContract):
    def make(self, folder: Path) -> DocumentSource:
        import pyarrow
        from pyarrow import parquet

        for name in ("train", "test"):
            (folder / "data" / name).mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.table({"text": TEXTS[:4]}), folder / "data" / name / "0000.parquet")
        return TextFiles(path=str(folder / "data"))

    def broken(self, folder: Path) -> Mapping[str, DocumentSource]:
        (folder / "a.parquet").write_bytes(b"PAR1PAR1")
        return {"not Parquet": TextFiles(path=str(folder / "a.parquet"))}


@pytest.mark.slow
class TestWikipedia(DataSourceContract):
    @pytest.fixture(autouse=True)
    def _real_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Downloads are kept where users keep them."""
        monkeypatch.setenv("EVOSWEEP_CACHE", platformdirs.user_cache_dir("evosweep", appauthor=False))

    def make(self, folder: Path) -> DocumentSource:
        return Wikipedia()
