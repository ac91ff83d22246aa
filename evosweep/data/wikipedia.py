"""English Wikipedia articles that gensim ships as test data, cleaned of markup."""

import bz2
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell

from evosweep.assets.cache_folder import cache_folder
from evosweep.assets.wheels import WheelFile
from evosweep.core.errors import AssetError
from evosweep.core.events import Progress
from evosweep.core.files import write_json
from evosweep.data.documents import Document

DUMP = WheelFile(
    requirement="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # The file is the same in every build; one is named, so that any Python on any platform gets it.
    platform=("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
)
CLEANING = 1  # raise when clean() changes: cached text then is made anew
_CACHED = f"wikipedia-{DUMP.sha256[:12]}-{CLEANING}.json"

_IMAGE_LINE = re.compile(
    r"^(thumb|thumbnail|frame|left|right|center|upright[\d.=]*|\d+px)\b[^\n]*\|[^\n]*$", re.M | re.I
)
_CATEGORY_LINE = re.compile(r"^(Category|File|Image|[a-z]{2,3}(-[a-z]+)*):[^\n]*$", re.M)
_TABLE = re.compile(r"\{\|.*?\|\}", re.S)
_SPACES = re.compile(r"[ \t]+")
_BLANK = re.compile(r"\n\s*\n+")
_MIN_CHARACTERS = 200


class Wikipedia:
    """About a hundred whole articles, about 0.7 M tokens of SmolLM2's tokenizer."""

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return the articles; the id is the page's number in Wikipedia.

        Raises:
            AssetError: The dump is neither in the cache nor can it be downloaded.
        """
        dump = DUMP.fetch(progress=progress)
        texts = _cached_texts()
        if texts is None:
            pages = list(_pages(dump))
            cleaned = {page: clean(markup) for page, markup in progress.track(pages, description="cleaning Wikipedia")}
            texts = {page: text for page, text in cleaned.items() if len(text) >= _MIN_CHARACTERS}
            with suppress(OSError, AssetError):  # a read-only cache costs a minute at every start, nothing more
                write_json(cache_folder("text") / _CACHED, texts)
        return [Document(id=f"enwiki/{page}", text=text) for page, text in texts.items()]


def _cached_texts() -> dict[str, str] | None:
    """Return the cleaned articles by page, or None if the cache does not have them whole."""
    try:
        texts = json.loads((cache_folder("text") / _CACHED).read_text(encoding="utf-8"))
    except (OSError, ValueError, AssetError):
        return None
    whole = isinstance(texts, dict) and texts and all(isinstance(text, str) for text in texts.values())
    return texts if whole else None


def clean(markup: str) -> str:
    """Return an article's prose: no templates, tables, references, image captions or category lines."""
    code = mwparserfromhell.parse(_TABLE.sub("", markup))
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in {"ref", "gallery", "math"}):
        tag.contents = ""  # the same text as removing the tag, which would search the whole article for it
    text = str(code.strip_code(normalize=True, collapse=True))
    text = _CATEGORY_LINE.sub("", _IMAGE_LINE.sub("", text))
    return _BLANK.sub("\n\n", _SPACES.sub(" ", text)).strip()


def _pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield (page id, markup) of every article that is not a redirect."""
    with bz2.open(dump) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag.removesuffix("page")
            markup = page.findtext(f"{space}revision/{space}text") or ""
            if page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None:
                yield page.findtext(f"{space}id") or "", markup
            page.clear()
