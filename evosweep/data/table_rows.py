"""Rows of a table turned into documents: one column that holds text or conversations."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evosweep.core.errors import DataError, SettingError, did_you_mean
from evosweep.data.documents import Document

TEMPLATES = ("chat",)


def check_template(template: object) -> str | None:
    """Return ``template`` if it is None or one of TEMPLATES; raise SettingError otherwise."""
    if template is not None and template not in TEMPLATES:
        raise SettingError("template", allowed=["null", *TEMPLATES], got=template)
    return None if template is None else str(template)


def check_path(path: object, *, allowed: str) -> Path:
    """Return a path with the home directory filled in; raise SettingError where it is no text or empty."""
    if not isinstance(path, str) or not path:
        raise SettingError("path", allowed=allowed, got=path)
    return Path(path).expanduser()


def check_column(column: object) -> str:
    """Return a column's name; raise SettingError where it is no text or empty."""
    if not isinstance(column, str) or not column:
        raise SettingError("column", allowed="the name of a column", got=column)
    return column


def rows_to_documents(
    rows: Iterable[Mapping[str, Any]], *, column: str, prefix: str, template: str | None = None
) -> list[Document]:
    """Turn table rows into documents with the ids ``prefix#0``, ``prefix#1`` and so on; leave empty rows out.

    Args:
        rows: Rows as mappings from column to value.
        column: The column that is read.
        prefix: File or dataset that the rows come from, for ids and errors.
        template: None for a column of text, ``chat`` for a column of lists of messages.

    Raises:
        DataError: A row lacks the column, or the column holds something else.
    """
    documents = []
    for number, row in enumerate(rows):
        if column not in row:
            hint = did_you_mean(column, map(str, row))
            raise DataError(
                f"data.column: {prefix} has no column {column!r}{hint}, only {list(row)} (row {number + 1})"
            )
        value = row[column]
        if value is None:
            continue
        if not (isinstance(value, str) if template is None else is_conversation(value)):
            raise _wrong_column(row, column=column, where=f"{prefix} (row {number + 1})", template=template)
        messages = () if template is None else tuple(value)
        text = value if template is None else "\n".join(_content(message) for message in messages)
        if text.strip():
            documents.append(Document(id=f"{prefix}#{number}", text=text, messages=messages))
    return documents


def is_conversation(value: object) -> bool:
    """Return whether ``value`` is a list of messages, objects with a ``role`` and a ``content``."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and isinstance(item.get("role"), str) and "content" in item for item in value
    )


def kind_of(value: object) -> str:
    """Return what a column of such values holds, as a plural noun phrase for error messages."""
    if isinstance(value, list) and value:
        return "lists of messages" if is_conversation(value) else f"lists of {kind_of(value[0])}"
    if isinstance(value, Mapping):
        return f"objects with the keys {', '.join(map(str, value)) or 'none'}"
    kinds = {str: "text", bool: "true or false", int: "integers", float: "numbers", list: "empty lists"}
    return kinds.get(type(value), f"values of the type {type(value).__name__}")


def _wrong_column(row: Mapping[str, Any], *, column: str, where: str, template: str | None) -> DataError:
    """Return the error for a column that holds neither what is needed nor nothing."""
    value = row[column]
    others = {name: kind_of(other) for name, other in row.items() if name != column and other is not None}
    needed = "text" if template is None else "lists of messages"
    candidates = [str(name) for name, kind in others.items() if kind == needed]
    if template is not None:
        fix = "every message needs a role and a content"
        fix = "data.template=null reads text as it is" if isinstance(value, str) else fix
    elif is_conversation(value) and value:
        fix = "data.template=chat renders them by the tokenizer's chat template"
    else:
        fix = ""
    hints = [*([fix] if fix else []), *([f"columns of {needed}: {', '.join(candidates)}"] if candidates else [])]
    tail = "; ".join(["", *hints])
    return DataError(f"data.column: {column!r} of {where} holds {kind_of(value)}, not {needed}{tail}")


def _content(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return "" if content is None else str(content)
