"""Long texts cut into sections, so that even one text can be divided into splits."""

import re
from collections.abc import Iterator, Sequence

from evosweep.data.documents import SPLITS, Document

SECTION_CHARACTERS = 4000
SECTIONS_WANTED = 50  # of a short text: a split's share of 6 % is then three sections
OVERSIZE = 4  # a piece of so many sections' size is cut at the next finer kind of boundary

# From coarse to fine: blank lines (which may hold spaces), line ends, white space.
BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n(?:[^\S\n]*\n)+", r"\n", r"\s"))


def normalize_line_ends(text: str) -> str:
    """Return ``text`` with ``\\n`` for every ``\\r\\n`` and ``\\r``."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def section_size(characters: int) -> int:
    """Return the least number of characters of a section of a text of ``characters`` characters."""
    return max(1, min(SECTION_CHARACTERS, characters // SECTIONS_WANTED))


def sections(text: str, *, characters: int | None = None) -> list[str]:
    """Cut ``text`` at blank lines into sections of at least ``characters``; the last may be shorter.

    A paragraph that is much longer than a section is cut at line ends, a line that is much longer at white space,
    and text without any white space at a fixed length.

    Args:
        text: Text with ``\\n`` as line end.
        characters: Least number of characters of a section; by default it follows the text's length.
    """
    size = characters or section_size(len(text))
    found = []
    start = None
    for begin, end in _pieces(text, 0, len(text), size, BOUNDARIES):
        start = begin if start is None else start
        if end - start >= size:
            found.append(text[start:end])
            start = None
    if start is not None:
        found.append(text[start:])
    return found


def cut_if_few(documents: Sequence[Document]) -> list[Document]:
    """Return the documents; where they are fewer than the splits, return their sections instead.

    Conversations are never cut.
    """
    if len(documents) >= len(SPLITS):
        return list(documents)
    size = section_size(sum(len(document.text) for document in documents))
    cut = []
    for document in documents:
        pieces = [document.text] if document.messages else sections(document.text, characters=size)
        kept = [piece for piece in pieces if piece.strip()]
        if len(kept) == 1:
            cut.append(document)
        else:
            cut += [Document(id=f"{document.id}#{number}", text=piece) for number, piece in enumerate(kept)]
    return cut


def _pieces(
    text: str, start: int, stop: int, size: int, boundaries: Sequence[re.Pattern[str]]
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the text between boundaries of the coarsest kind, oversized ones cut further."""
    if not boundaries:
        yield from ((begin, min(begin + size, stop)) for begin in range(start, stop, size))
        return
    ends = [(match.start(), match.end()) for match in boundaries[0].finditer(text, start, stop)]
    for end, following in [*ends, (stop, stop)]:
        if end - start > OVERSIZE * size:
            yield from _pieces(text, start, end, size, boundaries[1:])
        else:
            yield start, end
        start = following
