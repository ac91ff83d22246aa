"""Text too short for what is asked, and conversations."""

import re

import pytest
from tokenizers.processors import TemplateProcessing

from evosweep.core.errors import DataError, SettingError
from evosweep.data.documents import Document
from evosweep.data.tokens import Windows
from evosweep.models.load import byte_tokenizer
from evosweep.testing.tiny import RandomWords

SHARES = {"validation": 0.1, "search": 0.3, "calibration": 0.6}
CHAT = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


class Listed:
    def __init__(self, documents: list[Document]) -> None:
        self.listed = documents

    def documents(self, *, progress: object) -> list[Document]:
        return self.listed


def split(source, tokenizer=None, **changes) -> dict:
    settings = {"seq_len": 64, "calibration": 1024, "validation": 256, "shares": SHARES, **changes}
    return Windows(**settings).split(source, tokenizer or byte_tokenizer())


def refusal(source, **changes) -> str:
    with pytest.raises(DataError) as caught:
        split(source, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pasted(message: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"tokens\.(\w+)=(\d+)", message)}


class TestTooShort:
    # One byte, one token; a document's text and its blank line are 100 tokens, so the splits have 100, 300 and 600.
    source = Listed([Document(str(n), f"{n:098}") for n in range(10)])

    def test_all_splits_are_told_at_once(self) -> None:
        message = refusal(self.source, seq_len=64, calibration=6400, validation=1280)
        assert message == (
            "tokens.calibration must be at most 576, the tokens of the calibration split, got 6400; "
            "tokens.validation must be at most 64, the tokens of the validation split, got 1280 "
            "(validation has 100 tokens and needs 1280, search has 300 tokens and needs 64, "
            "calibration has 600 tokens and needs 6400); "
            "give more text, or what fits: tokens.seq_len=64 tokens.calibration=576 tokens.validation=64"
        )

    def test_windows_longer_than_a_split(self) -> None:
        message = refusal(self.source, seq_len=512, calibration=1024, validation=512)
        assert message.startswith("tokens.seq_len must be at most 100, the tokens of the validation split, got 512; ")
        assert message.endswith("what fits: tokens.seq_len=64 tokens.calibration=576 tokens.validation=64")

    @pytest.mark.parametrize(("seq_len", "advised"), [(64, 64), (512, 64), (300, 100), (302, 2), (101, 100)])
    def test_what_fits_fits(self, seq_len: int, advised: int) -> None:
        message = refusal(self.source, seq_len=seq_len, calibration=seq_len * 100, validation=seq_len * 100)
        settings = pasted(message)
        assert settings["seq_len"] == advised
        splits = split(self.source, **settings)
        assert {name: splits[name].tokens for name in ("calibration", "validation")} == {
            name: settings[name] for name in ("calibration", "validation")
        }

    def test_next_to_nothing(self) -> None:
        source = Listed([Document(str(n), str(n)) for n in range(3)])
        assert refusal(source).endswith(
            "give more text, or what fits: tokens.seq_len=2 " + "tokens.calibration=2 tokens.validation=2"
        )


class TestConversations:
    source = Listed([Document(str(n), "…", messages=tuple(CHAT)) for n in range(90)])

    def test_they_are_rendered_by_the_template(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        splits = split(self.source, tokenizer, validation=64)
        rendered = "<user>What is two and two?\n<assistant>Four.\n"
        text = "".join(map(tokenizer.decode, splits["search"].windows))
        assert text == (rendered * 90)[: len(text)] and len(text) >= 64

    def test_a_tokenizer_without_a_template(self) -> None:
        assert refusal(self.source).startswith("data.template=chat: the model's tokenizer has no chat template; use a")

    def test_a_template_that_refuses(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"^data\.template=chat: \d+ cannot be rendered .*: roles must alternate$"):
            split(self.source, tokenizer)


def test_only_whole_windows_are_cut() -> None:
    assert split(RandomWords())["search"].tokens % 64 == 0


class TestBeginning:
    """The byte tokenizer has no token for the beginning of a text; byte 0 plays it."""

    def tokenizer(self, *, adds: bool):
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
        if adds:
            single = f"{tokenizer.bos_token} $A"
            pieces = [(tokenizer.bos_token, 0)]
            tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=pieces)
        return tokenizer

    def test_every_window_begins_with_it_and_no_token_is_lost(self) -> None:
        plain = split(RandomWords())
        begun = split(RandomWords(), self.tokenizer(adds=False), bos=True)
        for name in plain:
            windows = begun[name].windows
            assert windows.shape[1] == 64 and (windows[:, 0] == 0).all()
        text = begun["search"].windows[:, 1:].reshape(-1)
        assert (text[:1000] == plain["search"].windows.reshape(-1)[:1000]).all()

    @pytest.mark.parametrize("adds", [True, False])
    def test_auto_does_what_the_tokenizer_does(self, adds: bool) -> None:
        windows = split(RandomWords(), self.tokenizer(adds=adds), bos="auto")["validation"].windows
        assert bool((windows[:, 0] == 0).all()) == adds

    def test_a_tokenizer_without_one(self) -> None:
        assert (split(RandomWords(), bos="auto")["search"].windows == split(RandomWords())["search"].windows).all()
        with pytest.raises(SettingError, match="bos must be false or auto: this tokenizer has no such token, got True"):
            split(RandomWords(), bos=True)

    def test_other_values(self) -> None:
        with pytest.raises(SettingError, match="bos must be true, false or auto, got 'yes'"):
            split(RandomWords(), bos="yes")


class TestSeed:
    source = RandomWords()

    def test_seeds_draw_other_calibration_windows_and_the_same_others(self) -> None:
        first, again, other, spaced = (split(self.source, seed=seed) for seed in (1, 1, 2, 0))
        assert first["calibration"].hash == again["calibration"].hash
        assert len({splits["calibration"].hash for splits in (first, other, spaced)}) == 3
        assert len({splits[name].hash for splits in (first, other, spaced) for name in ("search", "validation")}) == 2

    def test_no_window_is_drawn_twice(self) -> None:
        windows = split(self.source, seed=3)["calibration"].windows
        assert len({window.tobytes() for window in windows}) == len(windows) == 16
