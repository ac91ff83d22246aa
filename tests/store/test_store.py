import json
import re
import shutil

import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import StoreError
from evosweep.core.events import Silent
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.outliers import outlier_ratios
from evosweep.store.store_plan import plan_store


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    return tmp_path


def opened(anatomy, splits, *, builder: StoreBuilder | None = None, compressor=None) -> tuple[LevelStore, list[str]]:
    heard = Heard()
    compressor = compressor or RoundToNearest(bits=[2, 4], group=16)
    store = (builder or StoreBuilder()).open(
        plan_store(anatomy, compressor), splits["calibration"], model_name="t", progress=heard
    )
    return store, heard.lines


def test_second_time_it_is_found_and_said_so(anatomy, splits, fresh_cache) -> None:
    first, lines = opened(anatomy, splits)
    assert "built" in lines[-1]
    second, lines = opened(anatomy, splits)
    assert "found" in lines[-1] and second.key == first.key


def test_building_leaves_the_model_as_it_was(anatomy, splits, fresh_cache) -> None:
    before = {name: tensor.clone() for name, tensor in anatomy.model.state_dict().items()}
    opened(anatomy, splits, compressor=GPTQ(bits=[2, 4], group=16))
    after = anatomy.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [
        {"compressor": RoundToNearest(bits=[2, 3], group=16)},
        {"compressor": RoundToNearest(bits=[2, 4], group=8)},
        {"compressor": RoundToNearest(bits=[2, 4], group=16, symmetric=True)},
        {"compressor": GPTQ(bits=[2, 4], group=16)},
        {"builder": StoreBuilder(propagate=None)},
        {"builder": StoreBuilder(token_weighting="plain")},
    ],
    ids=["bits", "group", "symmetric", "kind", "propagate", "weighting"],
)
def test_a_changed_setting_is_another_store(anatomy, splits, fresh_cache, change: dict) -> None:
    assert opened(anatomy, splits)[0].key != opened(anatomy, splits, **change)[0].key


def test_other_calibration_text_is_another_store(anatomy, splits, fresh_cache) -> None:
    other = splits | {"calibration": splits["search"]}
    assert opened(anatomy, splits)[0].key != opened(anatomy, other)[0].key


def test_batching_changes_nothing_that_matters(anatomy, splits, fresh_cache) -> None:
    compressor = GPTQ(bits=[2, 4], group=16)
    one, _ = opened(anatomy, splits, compressor=compressor)
    shutil.rmtree(one.folder)
    units = [(unit, level) for unit in one.units for level in unit.levels]
    two, lines = opened(anatomy, splits, compressor=compressor, builder=StoreBuilder(batch_tokens=32))
    assert "built" in lines[-1]
    again = {unit.name: unit for unit in two.units}
    for unit, level in units:
        twin = again[unit.name].levels[unit.levels.index(level)]
        assert twin.relative_error == pytest.approx(level.relative_error, rel=0.05)


def test_a_damaged_file_is_noticed_and_made_anew(anatomy, splits, fresh_cache) -> None:
    store, _ = opened(anatomy, splits)
    victim = store.folder / "block_001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        LevelStore(store.folder)
    _, lines = opened(anatomy, splits)
    assert "damaged" in lines[0] and "built" in lines[-1]


def test_a_build_that_dies_leaves_nothing(anatomy, splits, fresh_cache, monkeypatch) -> None:
    monkeypatch.setattr(RoundToNearest, "compress", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError):
        opened(anatomy, splits)
    assert not [path for path in (fresh_cache / "stores").iterdir() if path.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("EVOSWEEP_CACHE", str(fresh_cache))
    assert "built" in opened(anatomy, splits)[1][-1]


def test_inputs_that_are_no_numbers_name_their_layer_and_leave_nothing(anatomy, splits, fresh_cache) -> None:
    slot = anatomy.slots_of(1)[0]
    gain = anatomy.blocks[1].input_layernorm.weight  # in no unit: its layers' weights are numbers
    before = gain[0].clone()
    with torch.no_grad():
        gain[0] = float("nan")
    try:
        with pytest.raises(StoreError, match=f"calibration inputs of {slot.name} hold NaN"):
            opened(anatomy, splits, builder=StoreBuilder(propagate=None))
    finally:
        with torch.no_grad():
            gain[0] = before
    assert not [path for path in (fresh_cache / "stores").iterdir() if path.is_dir()]


def test_errors_that_overflow_name_their_layer_and_leave_nothing(anatomy, splits, fresh_cache) -> None:
    slot = next(slot for slot in anatomy.slots if slot.name == "model.layers.1.mlp.down_proj")
    dense = slot.read().clone()
    plan = plan_store(anatomy, RoundToNearest(bits=[2], group=16))
    try:
        slot.write(dense * 1e25)  # each a number in fp32, their squares not
        with pytest.raises(StoreError, match=rf"^{re.escape(slot.name)}: output error .* too large for float32"):
            StoreBuilder().open(plan, splits["calibration"], model_name="tiny")
    finally:
        slot.write(dense)
    assert not list((fresh_cache / "stores").glob("*/manifest.json"))


def test_a_full_disk_is_told_before_any_work(anatomy, splits, fresh_cache, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(
        StoreError, match=r"needs about 0\.0193 MB in .*, where 0\.001 MB are free; make room, or set EVOSWEEP_CACHE"
    ):
        opened(anatomy, splits)
    assert not [path for path in (fresh_cache / "stores").iterdir() if path.is_dir()]


def test_another_schema_is_not_read(anatomy, splits, fresh_cache) -> None:
    store, _ = opened(anatomy, splits)
    path = store.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))
    with pytest.raises(StoreError, match="schema"):
        LevelStore(store.folder)


def test_unknown_levels_are_an_error(store) -> None:
    with pytest.raises(StoreError, match="9bit"):
        store.weight(store.units[0].name, "9bit")


def test_the_plan_says_what_the_store_says(anatomy, store) -> None:
    planned = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16)).units
    assert [(u.name, u.numel, u.block, [(v.name, v.cost) for v in u.levels]) for u in planned] == [
        (u.name, u.numel, u.block, [(v.name, v.cost) for v in u.levels]) for u in store.units
    ]


def test_every_unit_has_its_columns(store) -> None:
    for unit in store.units:
        errors = [level.error for level in unit.levels]
        assert errors == sorted(errors, reverse=True) and all(0 < level.relative_error < 1 for level in unit.levels)
        ratios = [unit.columns[f"outlier_ratio_m{multiple}"] for multiple in (3, 5, 7, 10)]
        assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("weighting", ["relative", "plain"])
def test_layer_errors_are_those_of_the_layer_on_its_inputs(anatomy, splits, fresh_cache, weighting: str) -> None:
    """First block, first linear: its inputs depend on no compressed layer."""
    builder = StoreBuilder(token_weighting=weighting)
    store, _ = opened(anatomy, splits, builder=builder, compressor=GPTQ(bits=[2, 4], group=16))
    slot, unit = anatomy.slots[0], store.units[0]
    heard = []
    handle = slot.module.register_forward_pre_hook(lambda _m, args: heard.append(args[0]))
    with torch.no_grad():
        anatomy.model(input_ids=torch.from_numpy(splits["calibration"].windows), use_cache=False)
    handle.remove()
    inputs = heard[0].flatten(0, 1)
    for level in unit.levels:
        difference = slot.read() - store.weight(unit.name, level.name)
        errors = (inputs @ difference.T).square().sum(1)
        if weighting == "relative":
            errors = errors / inputs.square().sum(1)
        assert level.error == pytest.approx(float(errors.mean()), rel=1e-3)


def test_outliers_are_counted_against_the_block() -> None:
    quiet, loud = torch.ones(4, 10), torch.ones(4, 10)
    loud[0, 0] = 1000.0
    ratios = outlier_ratios({"quiet": (lambda: quiet, torch.ones(10)), "loud": (lambda: loud, torch.ones(10))})
    assert ratios["quiet"]["outlier_ratio_m5"] == 0
    assert ratios["loud"]["outlier_ratio_m5"] == pytest.approx(1 / 40)


def test_packed_levels_are_small(store) -> None:
    weights = sum(unit.numel for unit in store.units)
    assert store.size < weights * 4 * 3 / 3  # three levels as fp32 copies would be 12 bytes a weight
