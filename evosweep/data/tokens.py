"""Token windows of one length, with stable ids."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_int
from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import digest
from evosweep.data.documents import SPLITS, Document, DocumentSource, check_shares, split_documents


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Return ``input_ids``, one list a text."""


@dataclass(frozen=True)
class TokenSplit:
    """Windows of one split.

    Attributes:
        name: ``calibration``, ``search`` or ``validation``.
        windows: Token ids, shape (windows, seq_len).
        documents: Ids of the documents that the windows were cut from.
    """

    name: str
    windows: npt.NDArray[np.int64]
    documents: tuple[str, ...]

    @property
    def seq_len(self) -> int:
        """Tokens a window."""
        return int(self.windows.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.windows.size)

    @property
    def hash(self) -> str:
        """Content hash of the windows."""
        content = hashlib.sha256(np.ascontiguousarray(self.windows, dtype="<i8").data).hexdigest()
        return digest([list(self.windows.shape), content])

    def count(self, setting: str, tokens: object) -> int:
        """Return how many windows ``tokens`` tokens are.

        Raises:
            SettingError: Not a whole number of windows.
            DataError: More tokens than the split has.
        """
        number = check_int(setting, tokens, low=1)
        if number % self.seq_len:
            raise SettingError(setting, allowed=f"a multiple of tokens.seq_len={self.seq_len}", got=number)
        if number > self.tokens:
            raise DataError(
                f"{setting} must be at most {self.tokens}, the tokens of the {self.name} split, got {number}"
            )
        return number // self.seq_len

    def sample(self, setting: str, tokens: object) -> "TokenSplit":
        """Return ``tokens`` tokens of the split, its windows evenly spaced, so that all documents have a say."""
        count = self.count(setting, tokens)
        places = np.arange(count) * len(self.windows) // count
        return TokenSplit(self.name, self.windows[places], self.documents)


class Windows:
    """Cuts documents into token windows in three splits that share no document.

    Args:
        seq_len: Tokens a window.
        calibration: Tokens of the calibration split that compressors see; a multiple of seq_len.
        validation: Tokens of the validation split that progress is reported on; a multiple of seq_len.
        shares: Share of the text that each split takes.
    """

    def __init__(self, *, seq_len: int, calibration: int, validation: int, shares: Mapping[str, float]) -> None:
        self.seq_len = check_int("seq_len", seq_len, low=2)
        self.limits = {"calibration": calibration, "validation": validation}
        for name, tokens in self.limits.items():
            check_int(f"{name}", tokens, low=self.seq_len)
        self.shares = check_shares(shares)

    def split(
        self, source: DocumentSource, tokenizer: Tokenizer, *, progress: Progress | None = None
    ) -> dict[str, TokenSplit]:
        """Read, divide and tokenize.

        Raises:
            DataError: Too little text for the tokens asked.
        """
        divided = split_documents(source.documents(progress=progress or Silent()), shares=self.shares)
        splits = {name: self._tokenize(name, divided[name], tokenizer) for name in SPLITS}
        return splits | {name: splits[name].sample(f"tokens.{name}", self.limits[name]) for name in self.limits}

    def _tokenize(self, name: str, documents: list[Document], tokenizer: Tokenizer) -> TokenSplit:
        # The blank line belongs to the document before it: then a split is its documents' text, joined.
        texts = [document.text.strip() + "\n\n" for document in documents]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        stream = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
        count = len(stream) // self.seq_len
        if not count:
            raise DataError(
                f"the {name} split has {len(stream)} tokens, less than one window of tokens.seq_len={self.seq_len}; "
                "give more text or a smaller tokens.seq_len"
            )
        windows = stream[: count * self.seq_len].reshape(count, self.seq_len)
        return TokenSplit(name, windows, tuple(document.id for document in documents))
