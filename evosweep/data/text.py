"""Text files and hub datasets, through ``datasets``."""

import codecs
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from evosweep.core.checks import check_int
from evosweep.core.errors import DataError, SettingError, did_you_mean
from evosweep.core.events import Progress
from evosweep.data.documents import Document

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SECTION_CHARACTERS = 4000


class TextFiles:
    """txt, jsonl or parquet on disk.

    A row of jsonl or parquet is a document; so is each txt file of a folder. A single txt file is cut at blank
    lines into sections of some pages.

    Args:
        path: A file, or a folder whose files of these kinds are all read.
        column: The column that holds the text, for jsonl and parquet.
    """

    def __init__(self, *, path: str, column: str = "text") -> None:
        if not isinstance(path, str) or not path:
            raise SettingError("path", allowed="a .txt, .jsonl or .parquet file, or a folder of them", got=path)
        self.path = Path(path).expanduser()
        self.column = column

    def documents(self, *, progress: Progress) -> list[Document]:
        """Read all files.

        Raises:
            DataError: Nothing there, not UTF-8, no such column, or empty.
        """
        del progress
        files = self._files()
        documents: list[Document] = []
        for file in files:
            documents += self._read(file, whole=len(files) > 1)
        if not documents:
            raise DataError(f"data.path: {self.path} has no text in it")
        return documents

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            files = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in KINDS)
            if not files:
                raise DataError(f"data.path: no {', '.join(KINDS)} file in the folder {self.path}")
            return files
        if not self.path.is_file():
            siblings = [item.name for item in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            raise DataError(f"data.path: there is no file {self.path}{did_you_mean(self.path.name, siblings)}")
        if self.path.suffix.lower() not in KINDS:
            raise SettingError("path", owner=self, allowed=f"a file ending in {', '.join(KINDS)}", got=str(self.path))
        return [self.path]

    def _read(self, file: Path, *, whole: bool) -> list[Document]:
        if file.suffix.lower() == ".txt":
            text = _utf8(file)
            parts = [text] if whole else sections(text)
            return [Document(id=f"{file.name}#{n}", text=part) for n, part in enumerate(parts) if part.strip()]
        if file.suffix.lower() != ".parquet":
            _utf8(file)
        rows = _load(KINDS[file.suffix.lower()], data_files=str(file), split="train", where=str(file))
        return rows_to_documents(rows, column=self.column, prefix=file.name)


class HubDataset:
    """A dataset of the Hugging Face hub, streamed.

    Args:
        path: Its id, e.g. ``HuggingFaceFW/fineweb-edu``.
        name: Configuration, if it has several.
        split: Which of its splits to read.
        column: The column that holds the text.
        max_documents: Rows read at most.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        max_documents: int = 2000,
    ) -> None:
        if not isinstance(path, str) or not path:
            raise SettingError("path", allowed="the id of a hub dataset, e.g. org/name", got=path)
        self.path, self.name, self.split, self.column = path, name, split, column
        self.max_documents = check_int("max_documents", max_documents, low=3)

    def documents(self, *, progress: Progress) -> list[Document]:
        """Stream the first ``max_documents`` rows.

        Raises:
            DataError: The hub cannot be reached, or there is no such dataset, split or column.
        """
        progress.say(f"streaming {self.path} from the hub")
        where = f"hub dataset {self.path}"
        rows = _load(self.path, name=self.name, split=self.split, streaming=True, where=where)
        return rows_to_documents(islice(rows, self.max_documents), column=self.column, prefix=self.path)


def rows_to_documents(rows: Iterable[Mapping[str, Any]], *, column: str, prefix: str) -> list[Document]:
    """Turn table rows into documents; empty texts are left out."""
    documents = []
    for number, row in enumerate(rows):
        if column not in row:
            hint = did_you_mean(column, row)
            raise DataError(f"data.column: {prefix} has no column {column!r}{hint}, only {list(row)}")
        text = row[column]
        if isinstance(text, str) and text.strip():
            documents.append(Document(id=f"{prefix}#{number}", text=text))
    return documents


def sections(text: str, *, characters: int = SECTION_CHARACTERS) -> list[str]:
    """Cut text at blank lines into sections of at least ``characters``; the last may be shorter."""
    parts: list[str] = []
    current: list[str] = []
    for paragraph in text.split("\n\n"):
        current.append(paragraph)
        if sum(map(len, current)) >= characters:
            parts.append("\n\n".join(current))
            current = []
    if current:
        parts.append("\n\n".join(current))
    return parts


def _utf8(file: Path) -> str:
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.path: {file} is not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"data.path: {file} cannot be read: {error.strerror}") from error


def _load(path: str, *, where: str, **options: Any) -> Any:
    """Call ``datasets.load_dataset``; whatever goes wrong in it is the user's data or network."""
    import datasets  # noqa: PLC0415 - slow to import, and only these sources need it

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # its builders raise many kinds
        first = str(error).strip().splitlines()
        raise DataError(f"data.path: {where} cannot be read: {first[0] if first else type(error).__name__}") from error
