"""Reads questions of tasks from requests, one JSON object a line: a context, a continuation, and which is right."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evosweep.core.errors import DataError

GZIP = b"\x1f\x8b"
UNCONDITIONAL = 1_000_000  # questions numbered from here on repeat others with their context left out


@dataclass(frozen=True)
class Question:
    """A context and its possible continuations; one alone, where the label is the text that should follow.

    Attributes:
        context: Text before every continuation.
        choices: The continuations, each with the space it begins with.
        right: Index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class _Request:
    number: int
    context: str
    choice: str
    right: int


def read_questions(content: bytes, *, name: str, limit: int | None = None) -> list[list[Question]]:
    """Return the questions of a file of requests in its order.

    Requests of a question stand behind one another. Where each choice has a context of its own and all the same
    continuation (WinoGrande), a question is given as one of a single choice for each, which are compared.

    Args:
        content: Of the file, ``.jsonl`` or ``.jsonl.gz``.
        name: Of the file, for messages.
        limit: How many questions at most; None: all.

    Returns:
        For every question its parts: mostly one, with all choices.

    Raises:
        DataError: A line is not what it should be; the line and the field are named.
    """
    found: list[list[Question]] = []
    for group in _grouped(_requests(content, name)):
        if limit is not None and len(found) == limit:
            break
        right = group[0].right
        if not 0 <= right < len(group):
            raise DataError(f"{name}: label of question {group[0].number} is {right}, of {len(group)} choices")
        if len({request.context for request in group}) == 1:
            found.append([Question(group[0].context, tuple(request.choice for request in group), right)])
        else:
            found.append([Question(request.context, (request.choice,), right) for request in group])
    if not found:
        raise DataError(f"{name} has no question in it")
    return found


def _grouped(requests: Iterable[_Request]) -> Iterator[list[_Request]]:
    group: list[_Request] = []
    for request in requests:
        if group and request.number != group[0].number:
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _requests(content: bytes, name: str) -> Iterator[_Request]:
    try:
        text = (gzip.decompress(content) if content[:2] == GZIP else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{name} is no text: {error}") from error
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            request = _request(line, f"{name}, line {number}")
            if request.number < UNCONDITIONAL:
                yield request


def _request(line: str, where: str) -> _Request:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    asked = _field(value, "request", dict, where)
    return _Request(
        number=_field(value, "doc_id", int, where),
        context=_field(asked, "context", str, where, inside="request."),
        choice=_field(asked, "continuation", str, where, inside="request."),
        right=0 if isinstance(value.get("label"), list) else _field(value, "label", int, where),
    )


def _field(value: Any, name: str, kind: type, where: str, inside: str = "") -> Any:
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        nouns = {dict: "an object", int: "an integer", str: "text"}
        raise DataError(f"{where}: {inside}{name} must be {nouns[kind]}, got {found!r}")
    return found
