"""Divides the documents of sources into splits that repeat none of each other's text."""

from collections.abc import Mapping, Sequence

from evosweep.core.errors import DataError
from evosweep.core.events import Progress
from evosweep.data.documents import SPLITS, Document, DocumentSource, hash_order, split_documents
from evosweep.data.near_duplicates import SeenDocuments

READ = ("search", "calibration")  # splits that decide something


class Partition:
    """Reads sources and divides their documents; says how many were left out as near-duplicates.

    Args:
        shares: Share of the characters of each split.
        near_duplicates: Similarity from which on documents of different splits are near-duplicates; None: those of
            the main text are not looked for.
        progress: Shows what is being read.
    """

    def __init__(self, *, shares: Mapping[str, float], near_duplicates: float | None, progress: Progress) -> None:
        self.shares = shares
        self.progress = progress
        self.threshold = near_duplicates
        self._seen = None if near_duplicates is None else SeenDocuments(threshold=near_duplicates)
        self._read: set[str] = set()  # whole texts of what decides something

    def divide(self, parts: Mapping[str, DocumentSource]) -> dict[str, dict[str, list[Document]]]:
        """Return the documents of each source by split: validation first, later splits without what repeats it.

        Args:
            parts: Sources by name.

        Raises:
            DataError: Nothing is left of a split.
        """
        divided = {
            name: split_documents(source.documents(progress=self.progress), shares=self.shares)
            for name, source in parts.items()
        }
        if self._seen is not None:
            for index, split in enumerate(SPLITS):
                self._leave_out(self._seen, divided, split, SPLITS[:index])
        for found in divided.values():
            self._read.update(document.text for split in READ for document in found[split])
        return divided

    def _leave_out(
        self,
        seen: SeenDocuments,
        divided: Mapping[str, dict[str, list[Document]]],
        split: str,
        earlier: Sequence[str],
    ) -> None:
        """Take from a split what repeats earlier ones.

        Args:
            seen: The documents of earlier splits.
            divided: Documents of each source by split; changed.
            split: Whose documents are looked at.
            earlier: The splits before it.
        """
        before = sum(len(found[split]) for found in divided.values())
        for found in divided.values():
            found[split] = seen.keep(found[split], use=split, apart_from=earlier)
        left = sum(len(found[split]) for found in divided.values())
        if left < before:
            self.progress.say(
                f"{split}: {before - left} of {before} documents left out, near-duplicates of "
                f"{' or '.join(earlier)} (tokens.near_duplicates={self.threshold:g})"
            )
        if not all(found[split] for found in divided.values()):
            raise DataError(
                f"tokens.near_duplicates={self.threshold:g} leaves nothing of the {split} split: every document "
                "repeats one of another split; give more text, or tokens.near_duplicates=null"
            )

    def left_of(self, name: str, source: DocumentSource, *, characters: int) -> list[Document]:
        """Return documents of a further text without near-duplicates of what search or calibration reads.

        They come in the order in which splits are filled, so that a text which is the main one as well gives the
        documents of its validation split.

        Args:
            name: Of the text, for messages.
            source: Its documents.
            characters: Documents enough for so many characters; all, if there are fewer.
        """
        kept: list[Document] = []
        size = 0
        seen = 0
        for document in hash_order(source.documents(progress=self.progress)):
            if size >= characters:
                break
            seen += 1
            if not self._is_read(document):
                kept.append(document)
                size += len(document.text)
        if len(kept) < seen:
            self.progress.say(
                f"data.validation: {seen - len(kept)} of {seen} documents of {name} left out: search or calibration "
                "reads them, or their near-duplicates"
            )
        return kept

    def _is_read(self, document: Document) -> bool:
        if document.text in self._read:
            return True
        return self._seen is not None and bool(self._seen.uses(document).intersection(READ))
