"""A manifest that was changed is never used, and never a traceback."""

import json
import shutil

import pytest

from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import StoreError
from evosweep.core.files import digest
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.manifest_rows import DIGEST_LENGTH, Manifest
from evosweep.store.store_plan import plan_store
from tests.store.test_store import Heard


@pytest.fixture(scope="module")
def plan(anatomy):
    return plan_store(anatomy, RoundToNearest(bits=[2, 4], group=16))


@pytest.fixture
def opened(plan, splits, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))

    def open_store() -> tuple[LevelStore, list[str]]:
        heard = Heard()
        store = StoreBuilder().open(plan, splits["calibration"], model_name="tiny", progress=heard)
        return store, heard.lines

    return open_store


def halve_costs(content: dict) -> None:
    for unit in content["units"]:
        for level in unit["levels"]:
            level["cost"] //= 2


def put(*path: object):
    *way, last, value = path

    def change(content: dict) -> None:
        for step in way:
            content = content[step]
        content[last] = value

    return change


def drop_key(*path: object):
    *way, last = path

    def change(content: dict) -> None:
        for step in way:
            content = content[step]
        del content[last]

    return change


EDITS = {
    "halved costs": halve_costs,
    "fixed bits": put("fixed_bits", 8),
    "a file's hash": put("files", "block_000.safetensors", "0" * 64),
    "another model": put("address", "model", "0" * 16),
    "no digest": drop_key("digest"),
    "no units": drop_key("units"),
}
WRONG_TYPES = {
    "fixed bits": (put("fixed_bits", "8"), "fixed_bits"),
    "a cost": (put("units", 0, "levels", 0, "cost", 1.5), r"units\.0\.levels\.0\.cost"),
    "a kind": (put("units", 0, "levels", 0, "nominal", "kind", "size"), r"nominal\.kind"),
    "units": (put("units", 5), "units"),
    "files": (put("files", ["block_000.safetensors"]), "files"),
    "a column": (put("units", 0, "columns", {"x": None}), r"columns\.x"),
    "no layout": (put("units", 0, "levels", 0, "payload", "bits"), "payload"),
    "no key": (drop_key("key"), "key"),
    "a path": (put("units", 0, "file", "../x.safetensors"), "files that do not belong"),
    "an address": (put("address", "model", "0" * 16), "holds another store"),
}


def edit(store: LevelStore, change, *, seal: bool) -> None:
    """Change a manifest, with a digest that fits if asked."""
    path = store.folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if seal:
        content.pop("digest")
        content["digest"] = digest(content, length=DIGEST_LENGTH)
    path.write_text(json.dumps(content))


def test_it_is_read_as_it_was_written(opened) -> None:
    store, _ = opened()
    again = Manifest.read(store.folder)
    assert again == store.manifest and again.key == store.folder.name
    assert again.units[0].to_json()["levels"][0]["payload"]["format"] == "evosweep.compressors.formats.grouped_int"
    assert type(again.units[0]).from_json(again.units[0].to_json()) == again.units[0]


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_refused_and_the_store_is_built_anew(opened, name: str) -> None:
    store, _ = opened()
    edit(store, EDITS[name], seal=False)
    with pytest.raises(StoreError, match=r"damaged: manifest\.json was changed"):
        LevelStore(store.folder)
    again, lines = opened()
    assert "was changed" in lines[0] and "building it anew" in lines[0] and "built" in lines[-1]
    assert again.manifest == store.manifest


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_are_one_line(opened, name: str) -> None:
    store, _ = opened()
    change, message = WRONG_TYPES[name]
    edit(store, change, seal=True)
    with pytest.raises(StoreError, match=message) as caught:
        LevelStore(store.folder)
    assert "\n" not in str(caught.value)
    assert "built" in opened()[1][-1]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', "\x00", '{"schema": 5}', "[" * 10**5])
def test_what_is_no_manifest_is_one_line(opened, text: str) -> None:
    store, _ = opened()
    (store.folder / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"no level store|damaged") as caught:
        LevelStore(store.folder)
    assert "\n" not in str(caught.value)
    assert "built" in opened()[1][-1]


def test_every_flipped_byte_of_a_manifest_is_noticed(opened) -> None:
    store, _ = opened()
    path = store.folder / "manifest.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    for position in range(0, len(whole), 97):
        data = bytearray(whole)
        data[position] ^= 1
        try:
            same = json.loads(data) == content  # a blank became another
        except ValueError:
            same = False
        path.write_bytes(data)
        if not same:
            with pytest.raises(StoreError):
                Manifest.read(store.folder)


def test_a_store_under_another_key_is_refused(opened, plan, splits, anatomy) -> None:
    store, _ = opened()
    other = StoreBuilder().open(
        plan_store(anatomy, RoundToNearest(bits=[2, 4], group=8)), splits["calibration"], model_name="tiny"
    )
    shutil.rmtree(store.folder)
    shutil.copytree(other.folder, store.folder)
    with pytest.raises(StoreError, match=f"holds another store, {other.key}"):
        LevelStore(store.folder)
    again, lines = opened()
    assert "holds another store" in lines[0] and again.key == store.key


@pytest.mark.parametrize(("schema", "word"), [(4, "an older"), (99, "another"), (None, "another"), ("5", "another")])
def test_other_versions_are_named(opened, schema: object, word: str) -> None:
    store, _ = opened()
    edit(store, put("schema", schema), seal=False)
    with pytest.raises(StoreError, match=rf"{word} version of evosweep \(schema {schema}, this one reads 5\)"):
        LevelStore(store.folder)


def test_a_store_of_the_last_version_is_named_when_it_is_built_anew(opened) -> None:
    store, _ = opened()
    address = {name: value for name, value in store.manifest.address.items() if name != "layer_errors"}
    older = store.folder.parent / digest({**address, "schema": 4})
    store.folder.rename(older)
    _, lines = opened()
    assert str(older) in lines[0] and "older version" in lines[0] and "built" in lines[-1]
