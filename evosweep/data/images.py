"""Images with captions: a folder of files, or JSON lines that name them; and windows of one image and its text each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from evosweep.core.errors import DataError, did_you_mean
from evosweep.core.events import Progress
from evosweep.data.documents import Document
from evosweep.data.pictures import Pictures, named_by_content
from evosweep.data.table_rows import check_column, check_path, check_template
from evosweep.data.text import json_rows, utf8

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SHARE = 0.9  # of the images, that the length in a message leaves
NOT_PASSED = ("input_ids", "attention_mask")


class ImageFiles:
    """Documents of an image and its caption each.

    Args:
        path: A folder of images, each with its caption beside it (``name.png`` and ``name.txt``); or a .jsonl file
            with the path of an image, relative to the file's folder, under ``image``, and its caption.
        column: The column that holds the caption, in JSON.
        template: None: the image and then the caption; ``chat``: the processor's chat template renders a user who shows
            the image and an answer that is the caption.
    """

    def __init__(self, *, path: str, column: str = "text", template: str | None = None) -> None:
        self.path = check_path(path, allowed="a folder of images with captions, or a .jsonl file")
        self.column = check_column(column)
        self.template = check_template(template)

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return a document for every image.

        Raises:
            DataError: No such folder or file, no images, or an image without a caption.
        """
        del progress
        if self.path.is_dir():
            pairs = list(self._of_folder())
        elif self.path.is_file() and self.path.suffix.lower() == ".jsonl":
            pairs = list(self._of_rows(json_rows(self.path)))
        elif self.path.exists():
            raise DataError(f"data.path: {self.path} must be a folder of images with captions, or a .jsonl file")
        else:
            siblings = [item.name for item in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            raise DataError(f"data.path: there is no {self.path}{did_you_mean(self.path.name, siblings)}")
        if not pairs:
            raise DataError(f"data.path: {self.path} holds no image ({', '.join(SUFFIXES)})")
        return [self._document(name, file, caption) for name, file, caption in pairs]

    def _of_folder(self) -> Iterator[tuple[str, Path, str]]:
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                beside = file.with_suffix(".txt")
                caption = utf8(beside).strip() if beside.is_file() else ""
                if not caption:
                    reason = "is empty" if beside.is_file() else "is not there"
                    raise DataError(f"data.path: {file} has no caption: {beside.name}, which would hold it, {reason}")
                yield file.relative_to(self.path).as_posix(), file, caption

    def _of_rows(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Path, str]]:
        for number, row in enumerate(rows):
            where = f"{self.path.name} (row {number + 1})"
            values = []
            for column in ("image", self.column):
                value = row.get(column)
                if not isinstance(value, str) or not value.strip():
                    hint = did_you_mean(column, map(str, row))
                    what = "caption" if column == self.column else "image"
                    raise DataError(
                        f"data.path: {where} has no {what}: text under {column!r} is expected{hint}, it has {list(row)}"
                    )
                values.append(value)
            yield f"{self.path.name}#{number}", self.path.parent / Path(values[0]).expanduser(), values[1].strip()

    def _document(self, name: str, file: Path, caption: str) -> Document:
        messages: tuple[Mapping[str, Any], ...] = ()
        if self.template is not None:
            asked = {"role": "user", "content": [{"type": "image"}]}
            messages = (asked, {"role": "assistant", "content": [{"type": "text", "text": caption}]})
        return Document(id=name, text=caption, messages=messages, image=file)


@dataclass(frozen=True)
class ImageProcessor:
    """What prepares an image with its text for a model.

    Attributes:
        processor: Of transformers.
        placeholder: Token id in whose place the model puts a token of an image.
    """

    processor: Any
    placeholder: int


class ImageWindows:
    """Makes windows of one image and its text each, through a model's processor.

    A window is the first ``seq_len`` tokens of an image with its text; where these are fewer, the image is left out:
    all windows have one length and none is filled up.

    Args:
        images: Prepares them.
        seq_len: Tokens a window.
    """

    def __init__(self, images: ImageProcessor, *, seq_len: int) -> None:
        self.processor = images.processor
        self.placeholder = images.placeholder
        self.seq_len = seq_len

    def cut(
        self, documents: Sequence[Document], *, split: str, count: int | None
    ) -> tuple[npt.NDArray[np.int64], Pictures]:
        """Return windows (windows, seq_len) of the first documents that are long enough, and their images.

        Args:
            documents: In the order in which they are taken.
            split: What they are for, for the message.
            count: How many windows; None: one of every document that is long enough.

        Raises:
            DataError: Too few are long enough, an image cannot be read, or the processor cannot prepare it.
        """
        windows: list[npt.NDArray[np.int64]] = []
        images: dict[int, Mapping[str, torch.Tensor]] = {}
        lengths = []
        for document in documents:
            if len(windows) == count:
                break
            ids, inputs, needed = self._prepared(document)
            lengths.append((len(ids), needed))
            if len(ids) >= self.seq_len >= needed:
                window, key = named_by_content(ids[: self.seq_len], inputs, placeholder=self.placeholder)
                windows.append(window)
                images[key] = inputs
        if len(windows) < (count or 1):
            raise DataError(self._too_few(split, len(windows), count or 1, lengths))
        return np.stack(windows), Pictures(self.placeholder, self.seq_len, images)

    def _too_few(self, split: str, found: int, wanted: int, lengths: Sequence[tuple[int, int]]) -> str:
        least = max(needed for _, needed in lengths)
        most = sorted((length for length, _ in lengths), reverse=True)[int(SHARE * (len(lengths) - 1))]
        fits = f"tokens.seq_len={most} fits nine in ten" if most >= least else f"an image takes {least - 2} tokens"
        return (
            f"the {split} split has {found} images that fill a window of tokens.seq_len={self.seq_len} tokens with "
            f"their text, of {len(lengths)}, and needs {wanted}: {fits}; or give more images, or lower tokens.{split}"
        )

    def _prepared(self, document: Document) -> tuple[npt.NDArray[np.int64], dict[str, torch.Tensor], int]:
        """Return a document's token ids, what the model is given beside them, and the least length of its window."""
        assert document.image is not None
        picture = _opened(document.image)
        text = self._text(document)
        begun = getattr(self.processor.tokenizer, "bos_token", None)
        once = {"add_special_tokens": False} if begun and text.startswith(begun) else {}  # a template has written it
        try:
            made = self.processor(images=[picture], text=[text], return_tensors="pt", **once)
        except Exception as error:  # processors raise many kinds
            raise DataError(
                f"data.path: {document.image} cannot be prepared by the model's processor: {_line(error)}"
            ) from error
        ids = made["input_ids"]
        at = (ids[0] == self.placeholder).nonzero().flatten().tolist()
        if not at:
            raise DataError(
                f"data.path: the model's processor makes no image token of {document.image}: data.template=chat, or a "
                "checkpoint with a processor that belongs to the model"
            )
        by_token = {name for name, value in made.items() if value.shape == ids.shape}
        inputs = {
            name: value[:, : self.seq_len] if name in by_token else value
            for name, value in made.items()
            if name not in NOT_PASSED
        }
        return ids[0].numpy(), inputs, at[-1] + 3  # a token of text that is scored, and one before it

    def _text(self, document: Document) -> str:
        if document.messages:
            if not getattr(self.processor, "chat_template", None):
                raise DataError("data.template=chat: the model's processor has no chat template: data.template=null")
            return str(self.processor.apply_chat_template([dict(one) for one in document.messages], tokenize=False))
        mark = getattr(self.processor, "boi_token", None) or self.processor.image_token
        return document.text if mark in document.text else f"{mark}{document.text}"


def _opened(file: Path) -> Image.Image:
    """Return an image in memory.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with Image.open(file) as found:
            return found.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"data.path: there is no image {file}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"data.path: {file} cannot be read as an image: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
