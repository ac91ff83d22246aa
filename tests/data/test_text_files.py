"""Files as people have them: other line ends, subfolders, conversations, things that are no files."""

import json
import os

import pytest

from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Silent
from evosweep.data.documents import SPLITS, Document, split_documents
from evosweep.data.sections import cut_if_few, section_size, sections
from evosweep.data.text import TextFiles

SHARES = {"validation": 0.06, "search": 0.10, "calibration": 0.84}
CHAT = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]


class Notes(Silent):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def read(path, **more) -> list[Document]:
    return TextFiles(path=str(path), **more).documents(progress=Silent())


def refusal(path, **more) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PARAGRAPHS = [f"Paragraph {n} of a text about nothing. " * 8 for n in range(60)]
LINE = "A line that ends like every other line of this text does.\n"


class TestSections:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("lines alone", LINE * 119),
            ("unix", "\n\n".join(PARAGRAPHS)),
            ("windows", "\r\n\r\n".join(PARAGRAPHS)),
            ("old mac", "\r\r".join(PARAGRAPHS)),
            ("blank lines with spaces", "\n \t\n".join(PARAGRAPHS)),
            ("windows, blank lines with a space", "\r\n \r\n".join(PARAGRAPHS)),
            ("one line", "word " * 4000),
            ("no space at all", "中文" * 4000),
            ("one huge paragraph among small ones", "\n\n".join([*PARAGRAPHS[:3], LINE * 2000])),
            ("short", LINE * 6),
        ],
    )
    def test_shares_are_met_whatever_the_layout(self, tmp_path, name: str, content: str) -> None:
        (tmp_path / "a.txt").write_bytes(content.encode())
        documents = read(tmp_path / "a.txt")
        splits = split_documents(documents, shares=SHARES)
        total = sum(len(document.text) for document in documents)
        for split in SPLITS:
            found = sum(len(document.text) for document in splits[split]) / total
            assert found == pytest.approx(SHARES[split], abs=0.12 if name == "short" else 0.08)
        assert not any("\r" in document.text for document in documents)

    def test_windows_line_ends_give_the_same_documents(self, tmp_path) -> None:
        folder = tmp_path / "crlf"
        folder.mkdir()
        (tmp_path / "a.txt").write_bytes("\n\n".join(PARAGRAPHS).encode())
        (folder / "a.txt").write_bytes("\r\n\r\n".join(PARAGRAPHS).encode())
        assert read(tmp_path / "a.txt") == read(folder / "a.txt")

    def test_no_character_but_white_space_is_lost(self) -> None:
        for text in ("\n \n".join(PARAGRAPHS), LINE * 300, "word " * 4000, "中文" * 4000):
            assert "".join("".join(sections(text)).split()) == "".join(text.split())

    def test_paragraphs_stay_whole(self) -> None:
        text = "\n\n".join(PARAGRAPHS)
        assert set("\n\n".join(sections(text)).split("\n\n")) == set(PARAGRAPHS)

    def test_sizes(self) -> None:
        assert [section_size(n) for n in (0, 500, 50_000, 10**6)] == [1, 10, 1000, 4000]
        assert sections("a\n\nb\n\nc\n\nd", characters=3) == ["a\n\nb", "c\n\nd"]

    def test_two_documents_are_cut_and_three_are_not(self) -> None:
        two = [Document(id="a", text="\n\n".join(PARAGRAPHS)), Document(id="b", text="short")]
        cut = cut_if_few(two)
        assert [document.id for document in cut[:2]] == ["a#0", "a#1"] and cut[-1] == two[1]
        three = [*two, Document(id="c", text="x")]
        assert cut_if_few(three) == three

    def test_a_word_is_too_little(self, tmp_path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(DataError, match="1 documents cannot give 3 splits"):
            split_documents(read(tmp_path / "a.txt"), shares=SHARES)


class TestFolders:
    @pytest.mark.parametrize("suffix", ["parquet", "jsonl", "txt"])
    def test_equal_names_in_subfolders_have_different_ids(self, tmp_path, suffix: str) -> None:
        import pyarrow
        from pyarrow import parquet

        for folder in ("train", "test"):
            (tmp_path / folder).mkdir()
            path = tmp_path / folder / f"0000.{suffix}"
            texts = [f"{folder} {n}" for n in range(2)]
            if suffix == "parquet":
                parquet.write_table(pyarrow.table({"text": texts}), path)
            elif suffix == "jsonl":
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            else:
                path.write_text("\n\n".join(f"{text} {'x' * 100}" for text in texts))
        ids = [document.id for document in read(tmp_path)]
        assert len(set(ids)) == len(ids) >= 3
        assert {name.split("/")[0] for name in ids} == {"train", "test"}

    def test_what_is_no_regular_file_is_skipped_and_named(self, tmp_path) -> None:
        (tmp_path / "good.txt").write_text("\n\n".join(PARAGRAPHS))
        (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
        (tmp_path / "folder.txt").mkdir()
        os.mkfifo(tmp_path / "pipe.txt")
        notes = Notes()
        documents = TextFiles(path=str(tmp_path)).documents(progress=notes)
        assert {document.id.split("#")[0] for document in documents} == {"good.txt"}
        assert notes.lines == [
            f"skipped in {tmp_path}: dangling.txt (a link to nothing), "
            "folder.txt (a folder, whose files are read), pipe.txt (not a regular file)"
        ]

    def test_links_to_files_are_read(self, tmp_path) -> None:
        (tmp_path / "blob").write_text('{"text": "x"}\n' * 3)
        folder = tmp_path / "snapshot"
        folder.mkdir()
        (folder / "a.jsonl").symlink_to(tmp_path / "blob")
        assert [document.text for document in read(folder)] == ["x"] * 3

    def test_a_pipe_is_refused_without_reading(self, tmp_path) -> None:
        os.mkfifo(tmp_path / "pipe.txt")
        assert refusal(tmp_path / "pipe.txt") == f"data.path: {tmp_path / 'pipe.txt'} is not a regular file"

    @pytest.mark.parametrize("name", ["x" * 300 + ".txt", "a\0b.txt"])
    def test_impossible_names(self, tmp_path, name: str) -> None:
        assert refusal(tmp_path / name).startswith("data.path: ")

    def test_a_folder_of_other_things(self, tmp_path) -> None:
        (tmp_path / "a.pdf").write_text("x")
        assert refusal(tmp_path) == f"data.path: no .txt, .jsonl, .json, .parquet file in the folder {tmp_path}"


class TestBrokenFiles:
    def test_a_broken_line_is_told_by_number(self, tmp_path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"\n')
        assert f"{tmp_path / 'a.jsonl'}, line 3, cannot be read as JSON" in refusal(tmp_path / "a.jsonl")

    def test_a_line_that_is_no_object(self, tmp_path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n"y"\n')
        assert 'line 2, holds "y", not a JSON object' in refusal(tmp_path / "a.jsonl")

    def test_json_that_is_one_value(self, tmp_path) -> None:
        (tmp_path / "a.json").write_text('{\n "text": "x"\n}\n')
        assert "line 1, cannot be read as JSON" in refusal(tmp_path / "a.json")

    def test_json_that_is_a_list(self, tmp_path) -> None:
        (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}, {"text": "y"}, {"text": "z"}], indent=1))
        assert [document.text for document in read(tmp_path / "a.json")] == ["x", "y", "z"]

    def test_line_separators_inside_of_strings(self, tmp_path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x\u2028y"}\n' * 3, encoding="utf-8")
        assert [document.text for document in read(tmp_path / "a.jsonl")] == ["x\u2028y"] * 3

    def test_parquet_that_is_none(self, tmp_path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing else")
        assert refusal(tmp_path / "a.parquet").startswith(
            f"data.path: {tmp_path / 'a.parquet'} cannot be read as Parquet"
        )

    @pytest.mark.parametrize("suffix", ["jsonl", "json"])
    def test_json_that_is_not_utf8(self, tmp_path, suffix: str) -> None:
        (tmp_path / f"a.{suffix}").write_bytes('{"text": "naïve"}'.encode("latin-1"))
        assert f"a.{suffix} is not UTF-8 (byte 12)" in refusal(tmp_path / f"a.{suffix}")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
    @pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
    def test_empty_files(self, tmp_path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert refusal(tmp_path / name) == f"data.path: {tmp_path / name} has no text in it"


class TestColumns:
    def write(self, tmp_path, rows: list[dict]):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_messages_are_named_and_how_to_ask_for_them(self, tmp_path) -> None:
        path = self.write(tmp_path, [{"messages": CHAT}])
        assert refusal(path, column="messages") == (
            "data.column: 'messages' of a.jsonl (row 1) holds lists of messages, not text; "
            "data.template=chat renders them by the tokenizer's chat template"
        )

    def test_messages_are_kept(self, tmp_path) -> None:
        documents = read(self.write(tmp_path, [{"messages": CHAT}] * 3), column="messages", template="chat")
        assert [document.messages for document in documents] == [tuple(CHAT)] * 3
        assert documents[0].text == "What is two and two?\nFour."

    def test_messages_of_parquet_are_the_same(self, tmp_path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"messages": [CHAT] * 3}), tmp_path / "a.parquet")
        documents = read(tmp_path / "a.parquet", column="messages", template="chat")
        assert [document.messages for document in documents] == [tuple(CHAT)] * 3

    @pytest.mark.parametrize(
        ("value", "holds"),
        [
            (3, "integers"),
            (2.5, "numbers"),
            (True, "true or false"),
            ({"en": "x", "de": "y"}, "objects with the keys en, de"),
            (["a"], "lists of text"),
            ([{"from": "human", "value": "x"}], "lists of objects with the keys from, value"),
        ],
    )
    def test_other_values_are_named(self, tmp_path, value, holds: str) -> None:
        path = self.write(tmp_path, [{"text": None, "body": "x"}, {"text": value, "body": "x"}])
        assert refusal(path) == (
            f"data.column: 'text' of a.jsonl (row 2) holds {holds}, not text; columns of text: body"
        )

    def test_text_where_messages_were_asked(self, tmp_path) -> None:
        path = self.write(tmp_path, [{"text": "x", "turns": CHAT}])
        assert refusal(path, template="chat") == (
            "data.column: 'text' of a.jsonl (row 1) holds text, not lists of messages; "
            "data.template=null reads text as it is; columns of lists of messages: turns"
        )

    def test_templates_are_checked(self) -> None:
        with pytest.raises(SettingError, match=r"^template must be one of null, chat, got 'chatt' \(did you mean 'c"):
            TextFiles(path="a.jsonl", template="chatt")
