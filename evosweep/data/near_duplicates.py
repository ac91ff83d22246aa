"""Finds documents that are almost the same, by MinHash."""

import re
import zlib
from collections.abc import Iterable

from datasketch import MinHash, MinHashLSH

from evosweep.core.checks import check_number
from evosweep.data.documents import Document

SHINGLE = 5  # words
PERMUTATIONS = 128
# A word, or one sign of a script without spaces between words (kana, Chinese, Hangul).
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_EMPTY = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)  # CRC-32 spreads words well, and is fast


def check_threshold(value: float | None) -> float | None:
    """Return ``value`` if it is None or a similarity above 0 and at most 1."""
    return None if value is None else check_number("near_duplicates", value, low=0, high=1, exclusive=True)


class SeenDocuments:
    """Documents by what they are used for, found again by those that are almost the same.

    Two documents are near-duplicates where the Jaccard similarity of their sets of five words in sequence, case and
    punctuation left out, is at least a threshold. MinHash estimates it (Broder 1997) with a standard error of at most
    0.044.

    Args:
        threshold: Least similarity of near-duplicates, above 0 and at most 1.
    """

    def __init__(self, *, threshold: float) -> None:
        self.threshold = threshold
        self._index = MinHashLSH(threshold=min(threshold, 0.99), num_perm=PERMUTATIONS)
        self._seen: dict[str, tuple[str, MinHash]] = {}

    def uses(self, document: Document) -> set[str]:
        """Return what near-duplicates of a document are used for."""
        return self._uses(_sketch(document.text))

    def keep(self, documents: Iterable[Document], *, use: str, apart_from: Iterable[str]) -> list[Document]:
        """Return the documents without near-duplicates of those of other uses, and remember these.

        Args:
            documents: Candidates.
            use: What they are for.
            apart_from: Uses whose text they must not repeat.
        """
        others = set(apart_from)
        kept = []
        for document in documents:
            sketch = _sketch(document.text)
            if others & self._uses(sketch):
                continue
            key = str(len(self._seen))
            self._seen[key] = (use, sketch)
            self._index.insert(key, sketch)
            kept.append(document)
        return kept

    def _uses(self, sketch: MinHash) -> set[str]:
        found = (self._seen[key] for key in self._index.query(sketch))
        return {use for use, other in found if sketch.jaccard(other) >= self.threshold}


def _sketch(text: str) -> MinHash:
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - SHINGLE + 1)
    shingles = {" ".join(words[start : start + SHINGLE]).encode() for start in range(last)}
    sketch = _EMPTY.copy()
    sketch.update_batch(list(shingles))
    return sketch
