"""Images with captions as calibration data: read, windowed through a model's processor, calibrated and scored on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evosweep.api import tokenize
from evosweep.core.errors import DataError, ModelError, SettingError
from evosweep.core.events import Silent
from evosweep.data.images import ImageFiles, ImageProcessor, ImageWindows
from evosweep.data.mix import Mix
from evosweep.data.pictures import FIRST, Pictures
from evosweep.data.tokens import Windows
from evosweep.models.seeing import image_processor
from tests.models.seeing import save_seeing
from tests.models.test_towers import load

WORDS = ("red", "green", "blue", "small", "large", "round", "square", "bright", "dark", "lonely")


def draw(folder: Path, count: int = 24, size: int = 28) -> Path:
    """Write random images with captions of 30 to 60 letters."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(WORDS, 9)))
    return folder


def documents(path: Path, **settings: Any) -> list[Any]:
    return ImageFiles(path=str(path), **settings).documents(progress=Silent())


def test_a_folder_and_json_lines_give_the_same_images(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", 4)
    found = documents(folder)
    assert [one.id for one in found] == ["00.png", "01.png", "02.png", "03.png"]
    assert found[2].text == (folder / "02.txt").read_text() and found[2].image == folder / "02.png"
    rows = [{"image": f"images/{one.id}", "caption": one.text} for one in found]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = documents(file, column="caption")
    assert [(one.text, one.image) for one in read] == [(one.text, one.image) for one in found]
    assert [one.id for one in read] == [f"rows.jsonl#{number}" for number in range(4)]


def one_line(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        documents(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_with_files_is_one_line(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", 4)
    (folder / "03.txt").unlink()
    assert one_line(folder) == f"data.path: {folder}/03.png has no caption: 03.txt, which would hold it, is not there"
    (folder / "03.txt").write_text(" \n")
    assert one_line(folder).endswith("03.txt, which would hold it, is empty")
    assert "there is no " in one_line(tmp_path / "imags") and "images" in one_line(tmp_path / "imags")
    assert "must be a folder of images" in one_line(folder / "00.png")
    (tmp_path / "empty").mkdir()
    assert "holds no image (.bmp, .gif" in one_line(tmp_path / "empty")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "txt": "no"}))
    assert "row 1) has no caption: text under 'text' is expected" in one_line(rows)
    with pytest.raises(SettingError, match="template must be"):
        ImageFiles(path="x", template="chats")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    return image_processor(load(save_seeing("llava", tmp_path_factory.mktemp("llava") / "llava")))


def test_a_window_is_an_image_and_the_beginning_of_its_text(images: ImageProcessor, tmp_path: Path) -> None:
    found = documents(draw(tmp_path / "images", 6))
    windows, pictures = ImageWindows(images, seq_len=24).cut(found, split="search", count=None)
    assert windows.shape == (6, 24)
    assert len(pictures.inputs) == 6 and pictures.seq_len == 24
    for window, document in zip(windows, found, strict=True):
        assert (window >= FIRST).sum() == 4 and len(set(window[:4])) == 1
        assert images.processor.tokenizer.decode(window[4:].tolist()) == document.text[:20]
        given = pictures.arguments(torch.from_numpy(window[None]), dtype=torch.float32)
        made = images.processor(images=Image.open(document.image), text=f"<image>{document.text}", return_tensors="pt")
        assert torch.equal(given["input_ids"], made["input_ids"][:, :24])
        assert torch.equal(given["pixel_values"], made["pixel_values"])
    again, _ = ImageWindows(images, seq_len=24).cut(found[::-1], split="search", count=2)
    assert (again == windows[:3:-1]).all()  # ids say what is in an image, in every order of reading


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
)


def test_a_chat_template_renders_who_shows_the_image_and_who_answers(tmp_path: Path) -> None:
    talking = image_processor(load(save_seeing("llava", tmp_path / "llava")))
    talking.processor.chat_template = CHAT
    tokenizer = talking.processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "!"})
    (first, *_) = documents(draw(tmp_path / "images", 3), template="chat")
    windows, pictures = ImageWindows(talking, seq_len=40).cut([first], split="search", count=1)
    plain = pictures.plain(torch.from_numpy(windows))[0].tolist()
    assert tokenizer.decode(plain) == ("!user: " + 4 * "<image>" + ";assistant: " + first.text)[: 40 + 3 * 7 + 3]


def test_an_image_that_cannot_be_used_is_one_line(images: ImageProcessor, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", 4)
    maker = ImageWindows(images, seq_len=48)
    with pytest.raises(DataError, match=r"needs 4: tokens.seq_len=\d+ fits nine in ten; or give more images"):
        ImageWindows(images, seq_len=200).cut(documents(folder), split="search", count=4)
    with pytest.raises(DataError, match=r"an image takes 4 tokens; or"):
        (folder / "00.txt").write_text("a")
        maker.cut(documents(folder)[:1], split="search", count=1)
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"data.path: .*00.png cannot be read as an image: \S") as caught:
        maker.cut(documents(folder), split="search", count=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"data.template=chat: the model's processor has no chat template"):
        maker.cut(documents(folder, template="chat")[1:], split="search", count=1)


def test_python_tokenizes_images_and_every_split_has_its_own(tmp_path: Path) -> None:
    loaded = load(save_seeing("llava", tmp_path / "llava"))
    source = ImageFiles(path=str(draw(tmp_path / "images")))
    shares = {"validation": 0.25, "search": 0.25, "calibration": 0.5}
    splits = tokenize(source, loaded, seq_len=32, calibration=128, validation=64, shares=shares)
    assert {name: len(split.pictures.inputs) for name, split in splits.items()} == {
        "validation": 2,
        "search": len(splits["search"].windows),
        "calibration": 4,
    }
    seen = [set(split.pictures.inputs) for split in splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen))
    blind = replace(loaded, processor=None)
    with pytest.raises(ModelError, match=r"data=images needs the model's processor"):
        tokenize(source, blind, seq_len=32, calibration=128, validation=64, shares=shares)


def test_images_are_no_part_of_a_mix(images: ImageProcessor, tmp_path: Path) -> None:
    mix = Mix(shares={"own": 1.0}, sources={"own": ImageFiles(path=str(draw(tmp_path / "images")))})
    shares = {"validation": 0.25, "search": 0.25, "calibration": 0.5}
    with pytest.raises(DataError, match=r"data=images, no data.shares or data.validation"):
        Windows(seq_len=32, calibration=32, validation=32, shares=shares).split(mix, images.processor.tokenizer)


def test_a_batch_has_the_images_of_its_windows_in_one_shape() -> None:
    sizes = {FIRST + 1: (1, 2, 3), FIRST + 2: (1, 4, 2)}
    pictures = Pictures(7, 4, {key: {"pixel_values": torch.ones(size)} for key, size in sizes.items()})
    windows = torch.tensor([[1, FIRST + 2, FIRST + 2, 3], [FIRST + 1, 4, 5, 6]])
    given = pictures.arguments(windows, dtype=torch.bfloat16)
    assert given["input_ids"].tolist() == [[1, 7, 7, 3], [7, 4, 5, 6]]
    expected = torch.zeros(2, 4, 3, dtype=torch.bfloat16)
    expected[0, :, :2] = 1
    expected[1, :2] = 1
    assert torch.equal(given["pixel_values"], expected)
    assert pictures.labels(windows).tolist() == [[1, -100, -100, 3], [-100, 4, 5, 6]]
    text = torch.ones(1, 4, dtype=torch.long)
    assert pictures.arguments(text, dtype=torch.float32).keys() == {"input_ids"}
    for wrong in (torch.cat([windows, text]), windows[:, :3]):
        with pytest.raises(ModelError, match="a window with an image must be read whole"):
            pictures.arguments(wrong, dtype=torch.float32)
