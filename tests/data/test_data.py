import json

import numpy as np
import pytest

from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Silent
from evosweep.data.documents import SPLITS, Document, split_documents
from evosweep.data.sections import sections
from evosweep.data.text import TextFiles
from evosweep.data.tokens import Windows
from evosweep.data.wikipedia import clean
from evosweep.models.load import byte_tokenizer
from evosweep.testing.tiny import RandomWords

SHARES = {"validation": 0.1, "search": 0.3, "calibration": 0.6}
QUIET = Silent()


def read(path, **more) -> list[Document]:
    return TextFiles(path=str(path), **more).documents(progress=QUIET)


class TestSplits:
    documents = RandomWords().documents(progress=QUIET)

    def test_no_document_is_in_two(self) -> None:
        splits = split_documents(self.documents, shares=SHARES)
        ids = [document.id for name in SPLITS for document in splits[name]]
        assert len(ids) == len(set(ids)) == len(self.documents)

    def test_order_of_reading_does_not_matter(self) -> None:
        assert split_documents(self.documents, shares=SHARES) == split_documents(self.documents[::-1], shares=SHARES)

    def test_validation_stays_when_other_shares_change(self) -> None:
        other = {**SHARES, "search": 0.5, "calibration": 0.4}
        first, second = (split_documents(self.documents, shares=shares) for shares in (SHARES, other))
        assert first["validation"] == second["validation"] and first["search"] != second["search"]

    def test_shares_are_met(self) -> None:
        splits = split_documents(self.documents, shares=SHARES)
        total = sum(len(document.text) for document in self.documents)
        for name in SPLITS:
            assert sum(len(d.text) for d in splits[name]) / total == pytest.approx(SHARES[name], abs=0.05)

    def test_too_few_documents(self) -> None:
        with pytest.raises(DataError, match="2 documents"):
            split_documents(self.documents[:2], shares=SHARES)


class TestWindows:
    def windows(self, **changes) -> Windows:
        return Windows(**{"seq_len": 64, "calibration": 1024, "validation": 256, "shares": SHARES, **changes})

    def test_windows_are_the_text(self) -> None:
        tokenizer, source = byte_tokenizer(), RandomWords()
        splits = self.windows().split(source, tokenizer)
        texts = {document.id: document.text for document in source.documents(progress=QUIET)}
        first = tokenizer.decode(splits["search"].windows[0])
        assert texts[splits["search"].documents[0]].startswith(first)
        assert splits["calibration"].windows.shape == (16, 64) and splits["validation"].windows.shape == (4, 64)

    def test_few_windows_are_spread_over_all_documents(self) -> None:
        whole = self.windows(calibration=64 * 150).split(RandomWords(), byte_tokenizer())["calibration"]
        few = whole.sample("calibration", 64 * 3).windows
        assert (few == whole.windows[[0, 50, 100]]).all()

    def test_same_text_same_hash(self) -> None:
        first, second = (self.windows().split(RandomWords(), byte_tokenizer()) for _ in range(2))
        assert {n: s.hash for n, s in first.items()} == {n: s.hash for n, s in second.items()}
        assert len({split.hash for split in first.values()}) == 3

    def test_more_tokens_than_there_are(self) -> None:
        with pytest.raises(DataError, match=r"calibration must be at most \d+, the tokens of the calibration"):
            self.windows(calibration=64 * 10**6).split(RandomWords(), byte_tokenizer())

    def test_part_of_a_window(self) -> None:
        with pytest.raises(SettingError, match=r"multiple of tokens\.seq_len=64"):
            self.windows(validation=100).split(RandomWords(), byte_tokenizer())

    @pytest.mark.parametrize(
        "changes",
        [
            {"seq_len": 1},
            {"seq_len": 2.5},
            {"calibration": 0},
            {"shares": {"search": 1.0}},
            {"shares": {"validation": 0.5, "search": 0.5, "calibration": 0.5}},
            {"shares": {"validation": 0, "search": 0.5, "calibration": 0.5}},
            {"shares": {"validation": "x", "search": 0.5, "calibration": 0.5}},
            {"shares": None},
            {"shares": 0.5},
            {"validation": 100},
            {"calibration": "many"},
        ],
    )
    def test_bad_settings_are_named(self, changes: dict) -> None:
        with pytest.raises(SettingError, match=next(iter(changes))):
            self.windows(**changes)


class TestTextFiles:
    def test_txt_jsonl_and_parquet_say_the_same(self, tmp_path) -> None:
        import pyarrow
        from pyarrow import parquet

        texts = [f"document {n} " * 30 for n in range(5)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        folder = tmp_path / "folder"
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text)
        for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet", folder):
            assert [document.text for document in read(path)] == texts

    def test_a_single_txt_is_cut_into_sections(self, tmp_path) -> None:
        text = "\n\n".join(f"paragraph {n} " * 40 for n in range(60))
        (tmp_path / "book.txt").write_text(text)
        documents = read(tmp_path / "book.txt")
        assert len(documents) > 3 and "\n\n".join(document.text for document in documents) == text
        assert sections("") == [""]

    def test_other_columns(self, tmp_path) -> None:
        (tmp_path / "a.jsonl").write_text('{"content": "x"}\n{"content": "y"}\n')
        assert [document.text for document in read(tmp_path / "a.jsonl", column="content")] == ["x", "y"]
        with pytest.raises(DataError, match=r"no column 'contents' \(did you mean 'content'"):
            read(tmp_path / "a.jsonl", column="contents")

    def test_what_is_not_utf8(self, tmp_path) -> None:
        (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
        with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 \(byte 2\)"):
            read(tmp_path / "latin.txt")

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
    def test_what_is_empty(self, tmp_path, name: str) -> None:
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=r"path"):
            read(tmp_path / name)

    def test_what_is_not_there_suggests_what_is(self, tmp_path) -> None:
        (tmp_path / "corpus.txt").write_text("x")
        with pytest.raises(DataError, match=r"did you mean 'corpus\.txt'"):
            read(tmp_path / "corpsu.txt")

    def test_another_kind_of_file(self, tmp_path) -> None:
        (tmp_path / "a.pdf").write_text("x")
        with pytest.raises(SettingError, match=r"\.parquet"):
            read(tmp_path / "a.pdf")

    def test_broken_jsonl(self, tmp_path) -> None:
        (tmp_path / "a.jsonl").write_text("{not json\n")
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / "a.jsonl")


def test_wiki_markup_becomes_prose() -> None:
    markup = (
        "{{Infobox|x=1}}'''Anarchism''' is a [[political philosophy|philosophy]].<ref>Somebody</ref>\n"
        "[[File:a.jpg|thumb|200px|A caption]]\n{| class=x\n|-\n| cell\n|}\n== History ==\nText here.\n\n\n"
        "[[Category:Ideas]]\n"
    )
    text = clean(markup)
    assert "Anarchism is a philosophy." in text and "Text here." in text
    for residue in ("Infobox", "Somebody", "caption", "cell", "Category", "[[", "'''", "\n\n\n"):
        assert residue not in text


def test_tokens_are_whole_numbers() -> None:
    splits = Windows(seq_len=64, calibration=1024, validation=256, shares=SHARES).split(RandomWords(), byte_tokenizer())
    assert splits["search"].windows.dtype == np.int64
    with pytest.raises(SettingError, match="an integer"):
        splits["search"].count("x", 64.0)
