"""Mixes of texts, near-duplicates across splits, and further texts to report on."""

from pathlib import Path

import numpy as np
import pytest

from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Silent
from evosweep.data.documents import Document
from evosweep.data.domains import PREFIX, Domains
from evosweep.data.mix import Mix, shared_out
from evosweep.data.near_duplicates import SeenDocuments
from evosweep.data.text_library import LIBRARY
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.models.load import byte_tokenizer

SHARES = {"validation": 0.2, "search": 0.3, "calibration": 0.5}
PHRASE = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma"


class Listed:
    """Documents of random words, in capitals where the sign is %."""

    def __init__(self, sign: str, *, count: int = 30, extra: list[Document] | None = None) -> None:
        draws = np.random.Generator(np.random.PCG64(ord(sign)))
        words = (PHRASE.upper() if sign == "%" else PHRASE).split()
        self.listed = [Document(f"{n}", " ".join(draws.choice(words, 60))) for n in range(count)]
        self.listed += extra or []

    def documents(self, *, progress: object) -> list[Document]:
        return self.listed


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def split(source: object, **changes: object) -> dict[str, TokenSplit]:
    domains = changes.pop("domains", None)
    progress = changes.pop("progress", None)
    settings = {"seq_len": 32, "calibration": 1280, "validation": 320, "shares": SHARES, **changes}
    return Windows(**settings).split(source, byte_tokenizer(), progress=progress, domains=domains)


def text_of(split: TokenSplit) -> str:
    return byte_tokenizer().decode(split.windows.reshape(-1).tolist())


def capitals(split: TokenSplit) -> int:
    """Return how many windows have text of the source in capitals."""
    return sum(byte_tokenizer().decode(window.tolist()).strip().isupper() for window in split.windows)


def test_every_split_has_the_shares() -> None:
    sources = {"first": Listed("#"), "second": Listed("%")}
    mixed = split(Mix(shares={"first": 0.75, "second": 0.25}, sources=sources))
    assert len(mixed["calibration"].windows) == 40 and capitals(mixed["calibration"]) == 10
    assert len(mixed["validation"].windows) == 10 and capitals(mixed["validation"]) in (2, 3)
    first = len(split(sources["first"])["search"].windows)
    assert len(mixed["search"].windows) == int(first / 0.75)
    assert capitals(mixed["search"]) == len(mixed["search"].windows) - first
    again = split(Mix(shares={"first": 0.75, "second": 0.25}, sources=sources))
    assert all(again[name].hash == mixed[name].hash for name in mixed)


def test_a_source_is_divided_as_it_is_alone() -> None:
    sources = {"first": Listed("#"), "second": Listed("%")}
    mixed = split(Mix(shares={"first": 0.5, "second": 0.5}, sources=sources))
    held_out = {f"first/{name}" for name in split(sources["first"])["validation"].documents}
    assert held_out < set(mixed["validation"].documents)


def test_shared_out_by_the_largest_remainder() -> None:
    assert shared_out(10, {"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 7, "b": 2, "c": 1}
    assert shared_out(4, {"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 3, "b": 1, "c": 0}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"wikipedia": 0.7, "code": 0.2}, "shares must be shares that sum to 1, got .*; their sum is 0.9"),
        ({"wikipedia": 0.7, "cod": 0.3}, "did you mean 'code'"),
        ({"wikipedia": 1.0, "code": 0}, r"shares\[code\] must be a number above 0"),
        ({}, "shares must be a share for each text"),
    ],
)
def test_wrong_shares_are_refused(shares: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Mix(shares=shares)


def test_a_source_too_small_for_its_share_is_named() -> None:
    sources = {"first": Listed("#"), "second": Listed("%", count=5)}
    message = r"data.shares: 'second' has \d+ windows of tokens.seq_len=32 in the calibration split and .* needs 32;"
    with pytest.raises(DataError, match=message):
        split(Mix(shares={"first": 0.2, "second": 0.8}, sources=sources), validation=640)


def test_near_duplicates_across_splits_are_left_out_and_said() -> None:
    words = Listed("#").listed[0].text.split()
    copies = [Document(f"copy {n}", " ".join([*words[:-1], f"v{n}"]).upper()) for n in range(20)]
    source = Listed("#", extra=copies)

    def holders(found: dict[str, TokenSplit]) -> set[str]:
        return {name for name, part in found.items() if any(copy.id in part.documents for copy in copies)}

    assert holders(split(source)) == {"validation", "search", "calibration"}
    said = Said()
    assert holders(split(source, near_duplicates=0.8, progress=said)) == {"validation"}
    assert [line.split(":")[0] for line in said.lines] == ["search", "calibration"]
    assert all(" documents left out, near-duplicates of validation" in line for line in said.lines)


def test_similarity_is_that_of_word_sequences() -> None:
    draws = np.random.Generator(np.random.PCG64(1))
    words = [f"w{n}" for n in draws.integers(10_000, size=400)]
    changed = [*words[:-8], *(f"v{n}" for n in range(8))]  # 388 of 396 shingles are kept: similarity 0.96
    half = [*words[:200], *(f"u{n}" for n in range(200))]  # similarity 0.33
    seen = SeenDocuments(threshold=0.8)
    seen.keep([Document("a", " ".join(words))], use="validation", apart_from=())
    assert seen.uses(Document("b", " ".join(changed))) == {"validation"}
    assert seen.uses(Document("c", " ".join(half))) == set()
    seen.keep([Document("d", "今日は天気がとても良いので散歩に行きましょう")], use="search", apart_from=())
    assert seen.uses(Document("e", "今日は天気がとても良いので散歩に行きましょう!")) == {"search"}


def test_a_further_text_leaves_out_what_decides_something() -> None:
    source = Listed("#")
    said = Said()
    found = split(source, near_duplicates=0.8, domains=Domains(sources={"same": source}), progress=said)
    assert found[PREFIX + "same"].hash == found["validation"].hash
    (line,) = said.lines
    assert line.startswith("data.validation: ") and " of 30 documents of same left out: search or calibration" in line
    assert split(source, domains=Domains(sources={"same": source}))[PREFIX + "same"].hash == found["validation"].hash


def test_a_further_text_changes_no_split() -> None:
    plain = split(Listed("#"))
    found = split(Listed("#"), domains=Domains(sources={"other": Listed("%")}))
    assert {name: found[name].hash for name in plain} == {name: part.hash for name, part in plain.items()}
    assert text_of(found[PREFIX + "other"]).isupper()


def test_a_further_text_with_too_few_tokens_is_named() -> None:
    with pytest.raises(DataError, match=r"data.validation: 'short' has \d+ tokens .* tokens.validation=320 are asked"):
        split(Listed("#"), domains=Domains(sources={"short": Listed("%", count=1)}))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["wikipedi"], "did you mean 'wikipedia'"),
        ("wikipedia", "sources must be a list of texts"),
        (["a/own.jsonl", "b/own.txt"], "texts whose names differ"),
        ([3], "sources must be one of"),
    ],
)
def test_further_texts_that_are_none_are_refused(sources: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Domains(sources=sources)


def test_files_of_other_languages_are_read(tmp_path: Path) -> None:
    (tmp_path / "greek.txt").write_text("\n\n".join("Ο ήλιος λάμπει πάνω από τη θάλασσα. " * 30 for _ in range(4)))
    found = split(Listed("#"), domains=Domains(sources=[str(tmp_path / "greek.txt")]))
    assert "θάλασσα" in text_of(found[PREFIX + "greek"])


@pytest.mark.parametrize(("name", "holds"), [("maths", "ducks"), ("code_problems", "def "), ("code", "import ")])
def test_the_library_holds_what_it_names(name: str, holds: str) -> None:
    documents = LIBRARY[name]().documents(progress=Silent())
    assert len({document.id for document in documents}) == len(documents) > 400
    assert sum(holds in document.text for document in documents) > (0 if name == "maths" else 100)
