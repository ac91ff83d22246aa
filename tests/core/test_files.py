import pytest

from evosweep.core.files import new_folder, remove_empty_folders, write_json
from evosweep.core.lru import ByteLRU
from evosweep.core.seeds import generator


def test_a_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path) -> None:
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert path.read_text() == '{\n "x": 1\n}\n' and len(list(tmp_path.iterdir())) == 1


def test_only_empty_folders_are_removed(tmp_path) -> None:
    deep = tmp_path / "runs" / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "runs" / "kept").write_text("x")
    remove_empty_folders(deep, stop=tmp_path)
    assert not deep.parent.exists() and (tmp_path / "runs" / "kept").exists()


def test_places_name_randomness() -> None:
    assert generator(1, "a", 2).random() == generator(1, "a", 2).random()
    places = ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a2"))
    assert len({generator(*place).random() for place in places}) == 5


def test_lru_keeps_what_was_used_last_within_its_bytes() -> None:
    made: list[int] = []

    def make(number: int) -> bytes:
        made.append(number)
        return bytes(10)

    cache: ByteLRU[bytes] = ByteLRU(limit=25, size=len)
    for number in (1, 2, 1, 3, 1, 2):
        cache.get(number, lambda number=number: make(number))
    assert made == [1, 2, 3, 2] and cache.used == 20
