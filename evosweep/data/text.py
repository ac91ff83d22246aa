"""Text, JSON and Parquet files on disk."""

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evosweep.core.errors import DataError, SettingError, did_you_mean
from evosweep.core.events import Progress
from evosweep.data.documents import Document
from evosweep.data.sections import cut_if_few, normalize_line_ends
from evosweep.data.table_rows import check_column, check_path, check_template, rows_to_documents

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
NAMED = 3  # skipped files that are named in a note


class TextFiles:
    """Documents of a .txt, .jsonl, .json or .parquet file, or of all such files in a folder.

    A row of JSON or Parquet is a document, and so is a .txt file. Where these are fewer than three, they are cut
    into sections at blank lines, or at line ends where there are no blank lines.

    Args:
        path: A file or a folder.
        column: The column that holds the text, for JSON and Parquet.
        template: None for text; ``chat`` for a column of messages, rendered by the tokenizer's chat template.
    """

    def __init__(self, *, path: str, column: str = "text", template: str | None = None) -> None:
        self.path = check_path(path, allowed="a .txt, .jsonl or .parquet file, or a folder of them")
        self.column = check_column(column)
        self.template = check_template(template)

    def documents(self, *, progress: Progress) -> list[Document]:
        """Read all files.

        Raises:
            DataError: No such file, not UTF-8, not JSON or Parquet, no such column, or no text.
        """
        documents: list[Document] = []
        for file in self._files(progress):
            documents += self._read(file)
        if not documents:
            raise DataError(f"data.path: {self.path} has no text in it")
        return cut_if_few(documents)

    def _files(self, progress: Progress) -> list[Path]:
        try:
            if self.path.is_dir():
                return self._files_of_folder(progress)
            if self.path.is_file():
                return [self._with_known_suffix()]
            exists = self.path.exists()
            siblings = [item.name for item in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
        except (OSError, ValueError) as error:
            raise DataError(f"data.path: {self.path} cannot be read: {_reason(error)}") from error
        if exists:
            raise DataError(f"data.path: {self.path} is not a regular file")
        raise DataError(f"data.path: there is no file {self.path}{did_you_mean(self.path.name, siblings)}")

    def _files_of_folder(self, progress: Progress) -> list[Path]:
        """Return the regular files of the folder; say which ones with the right suffix are something else."""
        named = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES)
        files = [file for file in named if file.is_file()]
        skipped = [file for file in named if not file.is_file()]
        if skipped:
            names = ", ".join(f"{file.relative_to(self.path).as_posix()} ({_kind(file)})" for file in skipped[:NAMED])
            more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
            progress.say(f"skipped in {self.path}: {names}{more}")
        if not files:
            raise DataError(f"data.path: no {', '.join(SUFFIXES)} file in the folder {self.path}")
        return files

    def _with_known_suffix(self) -> Path:
        if self.path.suffix.lower() not in SUFFIXES:
            raise SettingError(
                "path", owner=self, allowed=f"a file ending in {', '.join(SUFFIXES)}", got=str(self.path)
            )
        return self.path

    def _read(self, file: Path) -> list[Document]:
        # Relative to the folder that was given: two files of one name in different subfolders differ.
        name = file.name if file == self.path else file.relative_to(self.path).as_posix()
        if file.suffix.lower() == ".txt":
            text = normalize_line_ends(utf8(file))
            return [Document(id=name, text=text)] if text.strip() else []
        rows = _parquet_rows(file, self.column) if file.suffix.lower() == ".parquet" else json_rows(file)
        return rows_to_documents(rows, column=self.column, prefix=name, template=self.template)


def json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file that has one object a line, or that is one list of objects."""
    text = utf8(file)
    if text.lstrip().startswith("["):
        rows: Iterable[tuple[int, Any]] = enumerate(_parse_json(text, str(file)), start=1)
        noun = "item"
    else:
        # Not splitlines(): a JSON string may hold U+2028, which is a line end to Python alone.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        rows = ((number, _parse_json(line, f"{file}, line {number},")) for number, line in lines)
        noun = "line"
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"data.path: {file}, {noun} {number}, holds {json.dumps(row)[:40]}, not a JSON object")
        yield row


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else _reason(error)
        raise DataError(
            f"data.path: {where} cannot be read as JSON: {reason}; one object a line or one list of objects is expected"
        ) from error


def _parquet_rows(file: Path, column: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file: of ``column`` alone if the file has it, else all columns."""
    import pyarrow  # noqa: PLC0415 - slow to import, and only Parquet needs it
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with parquet.ParquetFile(file) as table:
            columns = [column] if column in table.schema_arrow.names else None
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"data.path: {file} cannot be read as Parquet: {_reason(error)}") from error


def utf8(file: Path) -> str:
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.path: {file} is not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"data.path: {file} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the first line of what an error says."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".")


def _kind(file: Path) -> str:
    """Return the kind of a path that is no regular file, for an error message."""
    if file.is_dir():
        return "a folder, whose files are read"
    return "a link to nothing" if file.is_symlink() and not file.exists() else "not a regular file"
