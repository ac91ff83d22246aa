"""Documents, and their division into splits that share none."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from evosweep.core.checks import check_number
from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Progress

SPLITS = ("validation", "search", "calibration")


@dataclass(frozen=True)
class Document:
    """A text with an id that stays the same wherever and whenever it is read."""

    id: str
    text: str


class DocumentSource(Protocol):
    """Where documents come from."""

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return all documents.

        Raises:
            DataError: There are none, or they cannot be read.
        """


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Return the splits' shares of the text if they name each split, are positive and sum to at most 1."""
    if set(shares) != set(SPLITS):
        raise SettingError("shares", allowed=f"one share for each of {', '.join(SPLITS)}", got=dict(shares))
    checked = {name: check_number(f"shares.{name}", shares[name], low=0, high=1, exclusive=True) for name in SPLITS}
    if sum(checked.values()) > 1 + 1e-9:
        raise SettingError("shares", allowed="shares that sum to at most 1", got=checked)
    return checked


def split_documents(documents: Sequence[Document], *, shares: Mapping[str, float]) -> dict[str, list[Document]]:
    """Divide documents among the splits, by characters, in an order that their ids alone decide.

    Validation takes its share first, so that it stays the same when only the other shares change.

    Args:
        documents: At least three, with different ids.
        shares: Share of all characters of each split, as ``check_shares`` returns them.

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
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())
    total = sum(len(document.text) for document in ordered)
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for place, name in enumerate(SPLITS):
        still_needed = len(SPLITS) - place - 1
        size = 0
        while len(ordered) > still_needed and (not splits[name] or size < shares[name] * total):
            splits[name].append(ordered.pop(0))
            size += len(splits[name][-1].text)
    return splits
