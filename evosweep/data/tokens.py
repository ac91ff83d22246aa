"""Token windows of one length, with stable ids."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_int
from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import digest
from evosweep.core.seeds import generator
from evosweep.data.documents import SPLITS, Document, DocumentSource, check_shares
from evosweep.data.domains import PREFIX, Domains
from evosweep.data.images import ImageProcessor, ImageWindows
from evosweep.data.mix import EXACT, Mix, shared_out
from evosweep.data.near_duplicates import check_threshold
from evosweep.data.partition import Partition
from evosweep.data.pictures import Pictures, text_weights

DOMAIN_CHARACTERS = 32  # read of a further text for each token asked: windows are spread over some times as many tokens


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Return ``input_ids``, one list for each text."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool) -> Any:
        """Return the conversation as text, with the special tokens written out."""


@dataclass(frozen=True)
class TokenSplit:
    """Token windows of one split.

    Attributes:
        name: ``calibration``, ``search`` or ``validation``.
        windows: Token ids, shape (windows, seq_len); ids of ``pictures`` in place of an image's tokens.
        documents: Ids of the documents that the windows were cut from.
        pictures: The images of the windows, if they have any.
    """

    name: str
    windows: npt.NDArray[np.int64]
    documents: tuple[str, ...]
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def seq_len(self) -> int:
        """Tokens per window."""
        return int(self.windows.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return int(self.windows.size)

    @property
    def hash(self) -> str:
        """Content hash of the windows."""
        content = hashlib.sha256(np.ascontiguousarray(self.windows, dtype="<i8").data).hexdigest()
        return digest([list(self.windows.shape), content])

    def weights(self, windows: Sequence[int], length: int) -> npt.NDArray[np.float32] | None:
        """Return the factors of the losses on some windows' first tokens, as ``text_weights``; None: all are one."""
        return text_weights(self.windows[list(windows)], length) if self.pictures.inputs else None

    def count(self, setting: str, tokens: object) -> int:
        """Return how many windows ``tokens`` tokens fill.

        Args:
            setting: Name of the setting that asks for them, for errors.
            tokens: A multiple of ``seq_len``.

        Raises:
            SettingError: Not a whole number of windows.
            DataError: More tokens than the split has.
        """
        number = check_int(setting, tokens, low=1)
        if number % self.seq_len:
            raise SettingError(setting, allowed=f"a multiple of tokens.seq_len={self.seq_len}", got=number)
        if number > self.tokens:
            raise DataError(_at_most(setting, self.tokens, split=self.name, got=number))
        return number // self.seq_len

    def sample(self, setting: str, tokens: object, *, seed: int = 0) -> "TokenSplit":
        """Return windows of ``tokens`` tokens in all.

        Args:
            setting: Name of the setting that asks for them, for errors.
            tokens: A multiple of ``seq_len``.
            seed: 0 takes evenly spaced windows, so that every document can contribute; any other number draws them.
        """
        count = self.count(setting, tokens)
        indices = np.arange(count) * len(self.windows) // count
        if seed:
            drawn = generator(seed, "windows", self.name).choice(len(self.windows), count, replace=False)
            indices = np.sort(drawn)
        return replace(self, windows=self.windows[indices])


class Windows:
    """Cuts documents into token windows in three splits that share no document.

    Args:
        seq_len: Tokens per window.
        calibration: Tokens of the calibration split that compressors see; a multiple of seq_len.
        validation: Tokens of the validation split that progress is reported on; a multiple of seq_len.
        shares: Share of the text that each split takes.
        seed: Which windows of the calibration split compressors see: 0 spaces them evenly, any other number draws them.
            Validation and search windows are the same for every seed.
        bos: Whether every window begins with the tokenizer's token for the beginning of a text: ``true``, ``false``,
            or ``auto``, which does what the tokenizer does to a text by itself.
        near_duplicates: Similarity from which on a document that repeats one of another split is left out; None: none
            is, and only documents with equal ids are kept apart.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        calibration: int,
        validation: int,
        shares: Mapping[str, float],
        seed: int = 0,
        bos: bool | str = False,
        near_duplicates: float | None = None,
    ) -> None:
        self.seq_len = check_int("seq_len", seq_len, low=2)
        self.seed = check_int("seed", seed, low=0)
        self.limits = {"calibration": calibration, "validation": validation}
        for name, tokens in self.limits.items():
            if check_int(name, tokens, low=1) < self.seq_len:
                raise SettingError(name, allowed=f"at least one window of tokens.seq_len={self.seq_len}", got=tokens)
            if tokens % self.seq_len:
                raise SettingError(name, allowed=f"a multiple of tokens.seq_len={self.seq_len}", got=tokens)
        self.shares = check_shares(shares)
        if not isinstance(bos, bool) and bos != "auto":
            raise SettingError("bos", allowed="true, false or auto", got=bos)
        self.bos = bos
        self.near_duplicates = check_threshold(near_duplicates)

    def split(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        progress: Progress | None = None,
        domains: Domains | None = None,
        images: ImageProcessor | None = None,
    ) -> dict[str, TokenSplit]:
        """Read documents, divide them among the splits and tokenize them.

        Args:
            source: Documents; of a mix, every split gets the shares that it names.
            tokenizer: A transformers tokenizer; conversations need one with a chat template.
            images: Prepares images with their text, for a source of them.
            progress: Shows what is being read.
            domains: Further texts, each of which becomes a split ``validation/<name>`` of as many tokens as validation,
                without what search and calibration read.

        Raises:
            DataError: Too little text for the tokens asked, or conversations that the tokenizer cannot render.
            SettingError: ``bos`` is true and the tokenizer has no such token.
        """
        partition = Partition(shares=self.shares, near_duplicates=self.near_duplicates, progress=progress or Silent())
        parts = source.parts if isinstance(source, Mix) else {"": source}
        divided = partition.divide(parts)
        bos = self._bos(tokenizer)
        if isinstance(source, Mix):
            splits = self._mixed(divided, source.shares, tokenizer, bos)
        elif images is not None:
            splits = self._seen(divided[""], images)
        else:
            splits = self._plain(divided[""], tokenizer, bos)
        for name, other in (domains or Domains()).sources.items():
            enough = DOMAIN_CHARACTERS * self.limits["validation"]
            documents = partition.left_of(name, other, characters=enough)
            splits[PREFIX + name] = self._domain(name, documents, tokenizer, bos)
        return splits

    def _plain(
        self, divided: Mapping[str, list[Document]], tokenizer: Tokenizer, bos: int | None
    ) -> dict[str, TokenSplit]:
        """Return the splits of one source."""
        streams = {name: self._begun(_token_stream(divided[name], tokenizer), bos) for name in SPLITS}
        self._check_lengths({name: len(stream) for name, stream in streams.items()})
        splits = {name: self._cut(name, stream, divided[name]) for name, stream in streams.items()}
        return splits | {
            name: splits[name].sample(f"tokens.{name}", limit, seed=self._seed(name))
            for name, limit in self.limits.items()
        }

    def _seen(self, divided: Mapping[str, list[Document]], images: ImageProcessor) -> dict[str, TokenSplit]:
        """Return the splits of images, a window of each: all of search, as many as asked of the others."""
        maker = ImageWindows(images, seq_len=self.seq_len)
        splits = {}
        for name in SPLITS:
            documents = divided[name]
            seed = self._seed(name)
            if seed:
                order = generator(seed, "windows", name).permutation(len(documents))
                documents = [documents[index] for index in order]
            count = self.limits[name] // self.seq_len if name in self.limits else None
            windows, pictures = maker.cut(documents, split=name, count=count)
            splits[name] = TokenSplit(name, windows, tuple(document.id for document in documents), pictures)
        return splits

    def _mixed(
        self,
        divided: Mapping[str, Mapping[str, list[Document]]],
        shares: Mapping[str, float],
        tokenizer: Tokenizer,
        bos: int | None,
    ) -> dict[str, TokenSplit]:
        """Return the splits of several sources, in each the same share of every source's windows.

        Args:
            divided: Documents by source and split.
            shares: Share of every source.
            tokenizer: As for ``split``.
            bos: Token that every window begins with.

        Raises:
            DataError: A source has too few tokens for its share.
        """
        mixed = {}
        for name in SPLITS:
            parts = {
                part: self._cut(name, self._begun(_token_stream(found[name], tokenizer), bos), found[name])
                for part, found in divided.items()
            }
            there = {part: len(split.windows) for part, split in parts.items()}
            if name in self.limits:
                counts = shared_out(self.limits[name] // self.seq_len, shares)
            else:
                counts = _most(there, shares)
            lacking = [part for part in parts if there[part] < max(counts[part], 1)]
            if lacking:
                part = lacking[0]
                raise DataError(
                    f"data.shares: {part!r} has {there[part]} windows of tokens.seq_len={self.seq_len} in the {name} "
                    f"split and its share needs {max(counts[part], 1)}; give it a smaller share, more text, or fewer "
                    f"tokens.{name}"
                )
            chosen = [
                parts[part].sample(f"tokens.{name}", count * self.seq_len, seed=self._seed(name))
                for part, count in counts.items()
                if count
            ]
            mixed[name] = TokenSplit(
                name,
                np.concatenate([split.windows for split in chosen]),
                tuple(f"{part}/{document}" for part, split in parts.items() for document in split.documents),
            )
        return mixed

    def _domain(self, name: str, documents: list[Document], tokenizer: Tokenizer, bos: int | None) -> TokenSplit:
        """Return the windows of a further text that results are reported on."""
        stream = self._begun(_token_stream(documents, tokenizer), bos) if documents else np.empty(0, dtype=np.int64)
        wanted = self.limits["validation"]
        if len(stream) // self.seq_len * self.seq_len < wanted:
            raise DataError(
                f"data.validation: {name!r} has {len(stream)} tokens that neither search nor calibration reads, and "
                f"tokens.validation={wanted} are asked; give it more text, or lower tokens.validation"
            )
        return self._cut(PREFIX + name, stream, documents).sample("tokens.validation", wanted)

    def _cut(self, name: str, stream: npt.NDArray[np.int64], documents: list[Document]) -> TokenSplit:
        """Return the whole windows of a stream of tokens."""
        windows = stream[: len(stream) // self.seq_len * self.seq_len].reshape(-1, self.seq_len)
        return TokenSplit(name, windows, tuple(document.id for document in documents))

    def _seed(self, split: str) -> int:
        return self.seed if split == "calibration" else 0

    def _bos(self, tokenizer: Any) -> int | None:
        """Return the token that every window begins with, or None."""
        if self.bos is False:
            return None
        token = getattr(tokenizer, "bos_token_id", None)
        if self.bos is True and token is None:
            raise SettingError("bos", allowed="false or auto: this tokenizer has no such token", got=True, owner=self)
        if self.bos == "auto" and token is not None:
            alone = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
            token = token if alone[0] == token else None
        return token

    def _begun(self, stream: npt.NDArray[np.int64], bos: int | None) -> npt.NDArray[np.int64]:
        """Return a stream of tokens with ``bos`` at the start of every window that it will be cut into."""
        return stream if bos is None else np.insert(stream, np.arange(0, len(stream), self.seq_len - 1), bos)

    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Raise DataError, with all splits' tokens and settings that fit, if a split has too few tokens."""
        needs = {name: self.limits.get(name, self.seq_len) for name in lengths}
        whole = {name: length // self.seq_len * self.seq_len for name, length in lengths.items()}
        problems = []
        if not all(whole.values()):
            shortest = min(lengths, key=lambda name: lengths[name])
            problems = [_at_most("tokens.seq_len", lengths[shortest], split=shortest, got=self.seq_len)]
        problems += [
            _at_most(f"tokens.{name}", whole[name], split=name, got=limit)
            for name, limit in self.limits.items()
            if 0 < whole[name] < limit
        ]
        if problems:
            table = ", ".join(f"{name} has {lengths[name]} tokens and needs {needs[name]}" for name in lengths)
            raise DataError(f"{'; '.join(problems)} ({table}); {self._advice(lengths)}")

    def _advice(self, lengths: Mapping[str, int]) -> str:
        """Return settings that fit splits of these lengths, as one line to paste."""
        shortest = min(lengths.values())
        if shortest < 2:
            return "give more text"
        # A divisor of today's length, so that search.stages stay multiples of it.
        divisors = (self.seq_len // k for k in range(1, self.seq_len // 2 + 1) if self.seq_len % k == 0)
        seq_len = next((divisor for divisor in divisors if divisor <= shortest), shortest)
        fitting = {name: min(self.limits[name], lengths[name]) // seq_len * seq_len for name in self.limits}
        pasted = " ".join(f"tokens.{name}={tokens}" for name, tokens in fitting.items())
        return f"give more text, or what fits: tokens.seq_len={seq_len} {pasted}"


def _most(there: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """Return the most windows of each part that keep the shares."""
    count = int(min(there[part] / share for part, share in shares.items()) + EXACT)
    while any(wanted > there[part] for part, wanted in shared_out(count, shares).items()):
        count -= 1
    return shared_out(count, shares)


def _at_most(setting: str, tokens: int, *, split: str, got: int) -> str:
    return f"{setting} must be at most {tokens}, the tokens of the {split} split, got {got}"


def _token_stream(documents: list[Document], tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return the tokens of all documents, one after the other, shape (tokens,)."""
    texts = [_render(document, tokenizer) for document in documents]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])


def _render(document: Document, tokenizer: Tokenizer) -> str:
    """Return the text of a document as the model reads it."""
    if document.image is not None:
        raise DataError("images with captions are a text by themselves: data=images, no data.shares or data.validation")
    if not document.messages:
        # A blank line ends a document, so that a split is the text of its documents, joined.
        return document.text.strip() + "\n\n"
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "data.template=chat: the model's tokenizer has no chat template; "
            "use a model that has one (often the one called instruct), or data.template=null with a column of text"
        )
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in document.messages], tokenize=False))
    except Exception as error:  # templates are programs of the model's makers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.template=chat: {document.id} cannot be rendered by the chat template: {reason}"
        ) from error
