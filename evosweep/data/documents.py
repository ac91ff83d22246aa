"""Documents, and their division into splits that share none."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evosweep.core.checks import check_number
from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Progress

SPLITS = ("validation", "search", "calibration")


@dataclass(frozen=True)
class Document:
    """A text with an id, the same in every process and in every order of reading.

    Attributes:
        id: Identifies the document within its source.
        text: The text; of a conversation, the contents of its messages.
        messages: The messages of a conversation, each with at least ``role`` and ``content``. The tokenizer's chat
            template renders them; empty for plain text.
        image: File of an image that the text belongs to.
    """

    id: str
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()
    image: Path | None = None


class DocumentSource(Protocol):
    """A corpus that can be read as documents."""

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return all documents: at least one, none of them empty, no id twice.

        Raises:
            DataError: There are none, or they cannot be read.
        """


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Return the splits' shares of the text if they name every split, are positive and sum to at most 1."""
    given = dict(shares) if isinstance(shares, Mapping) else shares
    if not isinstance(given, dict) or set(given) != set(SPLITS):
        raise SettingError("shares", allowed=f"one share for each of {', '.join(SPLITS)}", got=given)
    try:
        checked = {name: check_number(name, given[name], low=0, high=1, exclusive=True) for name in SPLITS}
    except SettingError as error:
        raise SettingError("shares", allowed="numbers above 0 and at most 1, one for each split", got=given) from error
    if sum(checked.values()) > 1 + 1e-9:
        raise SettingError("shares", allowed="shares that sum to at most 1", got=checked)
    return checked


def hash_order(documents: Sequence[Document]) -> list[Document]:
    """Return documents ordered by the hashes of their ids, the same in every order of reading."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())


def split_documents(documents: Sequence[Document], *, shares: Mapping[str, float]) -> dict[str, list[Document]]:
    """Divide documents among the splits by number of characters.

    The documents are ordered by the hashes of their ids, so the order of reading does not matter. Validation takes
    its share first and stays the same when only the other shares change.

    Args:
        documents: At least three, with different ids.
        shares: Share of all characters for each split, as ``check_shares`` returns them.

    Raises:
        DataError: Fewer than three documents, or a repeated id.
    """
    if len({document.id for document in documents}) != len(documents):
        raise DataError("two documents have the same id, so splits could share text")
    if len(documents) < len(SPLITS):
        raise DataError(
            f"{len(documents)} documents cannot give {len(SPLITS)} splits that share none "
            f"({', '.join(SPLITS)}); give more text"
        )
    remaining = hash_order(documents)
    total = sum(len(document.text) for document in remaining)
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for index, name in enumerate(SPLITS):
        reserved = len(SPLITS) - index - 1  # one document for each later split
        size = 0
        while len(remaining) > reserved and (not splits[name] or size < shares[name] * total):
            splits[name].append(remaining.pop(0))
            size += len(splits[name][-1].text)
    return splits
