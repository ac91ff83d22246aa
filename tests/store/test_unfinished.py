"""A store whose build was killed is continued at the block that it reached, and has the bytes of an undisturbed one."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from evosweep import parallel
from evosweep.cli.cache_command import entries
from evosweep.compressors.adaquant import AdaQuant
from evosweep.compressors.entropy import EntropyCoded
from evosweep.compressors.floating import FloatingPoint
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.low_rank import LowRank
from evosweep.compressors.lut import LookupTables
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.several import Several
from evosweep.compressors.sparse_gptq import SparseGPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.compressors.ternary import Ternary
from evosweep.compressors.vector import VectorGrids
from evosweep.core.events import Silent
from evosweep.core.files import write_json
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import Random
from evosweep.store.build import StoreBuilder
from evosweep.store.calibrate import MOST_AT_ONCE
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from evosweep.testing.tiny import tiny_config, tiny_splits
from tests.compressors.gradient_rows import GradientRows
from tests.store.test_store import Heard

BLOCKS = 6
REACHED = 3  # blocks that are finished when a build ends


@pytest.fixture(scope="module")
def loaded():
    return Random(name="deep", config=partial(tiny_config, num_hidden_layers=BLOCKS), spread=0.15, device="cpu").load(
        progress=Silent()
    )


@pytest.fixture(scope="module")
def deep(loaded):
    return Anatomy(loaded.model), tiny_splits(loaded)["calibration"]


class Phases(Heard):
    """Notes what is worked through."""

    def __init__(self, phases: list[str]) -> None:
        super().__init__()
        self.phases = phases

    def track(self, items: Sequence, *, description: str, tokens: int | None = None) -> Iterable:
        self.phases.append(description)
        return items


class Stops(Heard):
    """Ends a build, as Ctrl-C does, before a block."""

    def track(self, items: Sequence, *, description: str, tokens: int | None = None) -> Iterable:
        for item in items:
            if description == "building level store" and item == REACHED:
                raise KeyboardInterrupt
            yield item


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(plan, calibration, cache: Path, monkeypatch, *, builder=None, progress=None):
    monkeypatch.setenv("EVOSWEEP_CACHE", str(cache))
    heard = progress or Heard()
    store = (builder or StoreBuilder()).open(plan, calibration, model_name="deep", progress=heard)
    return bytes_of(store.folder), heard.lines


@pytest.fixture
def begun(deep, tmp_path, monkeypatch):
    """Returns a plan, its text, the folder of its store that was begun, and the bytes of an undisturbed one."""
    anatomy, calibration = deep
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16))
    whole, _ = build(plan, calibration, tmp_path / "whole", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build(plan, calibration, tmp_path / "cache", monkeypatch, progress=Stops())
    (partial_folder,) = (tmp_path / "cache" / "stores").glob("*.partial")
    return plan, calibration, partial_folder, whole


COMPRESSORS = {
    "gptq": GPTQ(bits=[2, 3, 4], group=16),
    "rtn": RoundToNearest(bits=[2, 4], group=16),
    "adaquant": AdaQuant(bits=[2, 4], group=16, steps=3),
    "lut": LookupTables(bits=[2, 3], rounds=1),
    "entropy": EntropyCoded(bits=[3, 4]),
    "floating": FloatingPoint(formats=["e2m1", "fp8"], group=16),
    "low_rank": LowRank(base=GPTQ(bits=[2, 3], group=16), ranks=[0, 2]),
    "sparsegpt": SparseGPT(sparsity=0.5, window=0.25),
    "sparse_gptq": SparseGPTQ(sparsity=[0.25, 0.5], bits=[3, 4], group=16),
    "ternary": Ternary(groups=["row", 16]),
    "vector": VectorGrids(points=[16, 64]),
    "several": Several(parts={"a": GPTQ(bits=[2], group=16), "b": LookupTables(bits=[3])}, dominated=True),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_s_store_is_the_same_after_a_stop(deep, tmp_path, monkeypatch, name: str) -> None:
    anatomy, calibration = deep
    plan = plan_store(anatomy, COMPRESSORS[name])
    whole, _ = build(plan, calibration, tmp_path / "whole", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build(plan, calibration, tmp_path / "cache", monkeypatch, progress=Stops())
    again, lines = build(plan, calibration, tmp_path / "cache", monkeypatch)
    assert "3 of 6 blocks are there already" in lines[0]
    assert again == whole


@pytest.mark.parametrize(
    "builder",
    [
        StoreBuilder(propagate=None),
        StoreBuilder(batch_tokens=64, token_weighting="attention", input_ranges=True),
        StoreBuilder(layer_errors=False),
    ],
    ids=["dense activations", "attention", "no errors"],
)
def test_every_way_of_calibrating_goes_on(deep, tmp_path, monkeypatch, builder: StoreBuilder) -> None:
    anatomy, calibration = deep
    units = Units(embedding=RoundToNearest(bits=[4, 8], group=16), head=GPTQ(bits=[4, 8], group=16))
    plan = plan_store(anatomy, GPTQ(bits=[2, 4], group=16), Drop(granularity="sublayers"), units)
    whole, _ = build(plan, calibration, tmp_path / "whole", monkeypatch, builder=builder)
    with pytest.raises(KeyboardInterrupt):
        build(plan, calibration, tmp_path / "cache", monkeypatch, builder=builder, progress=Stops())
    assert build(plan, calibration, tmp_path / "cache", monkeypatch, builder=builder)[0] == whole


def reached(cache: Path, process: BaseProcess) -> None:
    """Wait until a process has finished three blocks of a store."""
    while process.is_alive() and not list(cache.glob("stores/*.partial/2.json")):
        time.sleep(0.001)


def test_a_build_that_is_killed_goes_on(deep, tmp_path, monkeypatch) -> None:
    anatomy, calibration = deep
    plan = plan_store(anatomy, AdaQuant(bits=[2, 3, 4], group=16, steps=40))
    whole, _ = build(plan, calibration, tmp_path / "whole", monkeypatch)
    make = partial(build, plan, calibration, tmp_path / "cache", monkeypatch)
    process = multiprocessing.get_context("fork").Process(target=make)
    process.start()
    reached(tmp_path / "cache", process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (begun,) = (tmp_path / "cache" / "stores").glob("*.partial")
    there = bytes_of(begun)
    kept = {name: (begun / name).stat().st_mtime_ns for name in there if name.startswith("store/block_00")}
    again, lines = make()
    assert 3 <= int(lines[0].split("was begun: ")[1][0]) < BLOCKS
    assert again == whole
    (store,) = (path for path in (tmp_path / "cache" / "stores").iterdir() if path.is_dir())
    for name in ("store/block_000.safetensors", "store/block_001.safetensors", "store/block_002.safetensors"):
        assert (store / Path(name).name).stat().st_mtime_ns == kept[name]  # not written again


def test_who_waits_for_a_store_goes_on_where_its_builder_was_killed(deep, tmp_path, monkeypatch) -> None:
    anatomy, calibration = deep
    plan = plan_store(anatomy, AdaQuant(bits=[2, 3, 4], group=16, steps=40))
    whole, _ = build(plan, calibration, tmp_path / "whole", monkeypatch)
    forks = multiprocessing.get_context("fork")
    said: SimpleQueue = forks.SimpleQueue()

    def make() -> None:
        said.put(build(plan, calibration, tmp_path / "cache", monkeypatch)[1])

    builder = forks.Process(target=make)
    builder.start()
    reached(tmp_path / "cache", builder)
    waiting = forks.Process(target=make)
    waiting.start()
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    waiting.join()
    assert waiting.exitcode == 0
    assert any("blocks are there already" in line for line in said.get())
    (store,) = (path for path in (tmp_path / "cache" / "stores").iterdir() if path.is_dir())
    assert bytes_of(store) == whole


def test_two_processes_that_share_a_build_go_on_together(deep, tmp_path, monkeypatch) -> None:
    anatomy, calibration = deep
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16), Drop(granularity="blocks"))

    def member(rank: int, port: int, cache: Path, progress: Heard) -> None:
        meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in meeting.items()})
        parallel.join()
        build(plan, calibration, cache, monkeypatch, progress=progress)

    def both(name: str, progress: Heard) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        forks = multiprocessing.get_context("fork")
        processes = [forks.Process(target=member, args=(rank, port, tmp_path / name, progress)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    assert both("whole", Heard()) == [0, 0]
    assert 0 not in both("cache", Stops())
    assert list((tmp_path / "cache").glob("stores/*.partial/2.json"))
    assert both("cache", Heard()) == [0, 0]
    (whole,) = (tmp_path / "whole" / "stores").glob("*/")
    (again,) = (tmp_path / "cache" / "stores").glob("*/")
    assert bytes_of(again) == bytes_of(whole)


def test_a_damaged_block_is_made_again(begun, tmp_path, monkeypatch) -> None:
    plan, calibration, folder, whole = begun
    victim = folder / "store" / "block_001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    record = json.loads((folder / "2.json").read_text())
    record["rows"][0]["numel"] += 1
    (folder / "2.json").write_text(json.dumps(record))
    again, lines = build(plan, calibration, tmp_path / "cache", monkeypatch)
    assert "1 of 6 blocks are there already" in lines[0] and "block 1, 2 is damaged" in lines[1]
    assert again == whole


def test_what_was_cut_short_while_it_was_written_is_made_again(begun, tmp_path, monkeypatch) -> None:
    plan, calibration, folder, whole = begun
    (folder / "2.json").write_text((folder / "2.json").read_text()[:100])
    (folder / "store" / "block_003.tmp").write_bytes(b"\0" * 100)  # a block that was being written
    assert build(plan, calibration, tmp_path / "cache", monkeypatch)[0] == whole


@pytest.mark.parametrize("change", ["another address", "no settings", "another compressor"])
def test_what_is_there_of_another_store_is_never_used(begun, tmp_path, monkeypatch, change: str) -> None:
    plan, calibration, folder, whole = begun
    if change == "another compressor":
        plan = plan_store(plan.anatomy, RoundToNearest(bits=[2, 3, 4], group=16))
        whole, _ = build(plan, calibration, tmp_path / "other", monkeypatch)
    elif change == "no settings":
        (folder / "settings.json").unlink()
    else:
        settings = json.loads((folder / "settings.json").read_text())
        settings["address"]["model"] = "another"
        (folder / "settings.json").write_text(json.dumps(settings))
    again, lines = build(plan, calibration, tmp_path / "cache", monkeypatch)
    assert not any("there already" in line for line in lines) and again == whole


def test_statistics_of_the_whole_model_are_measured_once(deep, tmp_path, monkeypatch) -> None:
    anatomy, calibration = deep
    plan = plan_store(anatomy, GradientRows())
    measured = []
    whole, _ = build(plan, calibration, tmp_path / "whole", monkeypatch, progress=Phases(measured))
    assert measured.count("measuring gradients") == 1
    with pytest.raises(KeyboardInterrupt):
        build(plan, calibration, tmp_path / "cache", monkeypatch, progress=Stops())
    measured.clear()
    again, _ = build(plan, calibration, tmp_path / "cache", monkeypatch, progress=Phases(measured))
    assert measured == ["building level store"] and again == whole


@pytest.mark.parametrize(("earlier", "now"), [(64, 64), (10**9, 1024)])
def test_batches_are_those_that_the_build_began_with_where_they_fit(
    begun, tmp_path, monkeypatch, earlier: int, now: int
) -> None:
    plan, calibration, folder, _ = begun
    settings = json.loads((folder / "settings.json").read_text())
    write_json(folder / "settings.json", {**settings, "batch_tokens": earlier})
    monkeypatch.setitem(MOST_AT_ONCE, "cpu", 1024)
    with pytest.raises(KeyboardInterrupt):
        build(plan, calibration, tmp_path / "cache", monkeypatch, progress=Stops())
    assert json.loads((folder / "settings.json").read_text())["batch_tokens"] == now


def test_blocks_that_are_there_need_no_room(begun, tmp_path, monkeypatch) -> None:
    plan, calibration, folder, whole = begun
    there = sum(path.stat().st_size for path in (folder / "store").iterdir())
    needed = plan.level_bits // 8
    free = needed - there // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    assert build(plan, calibration, tmp_path / "cache", monkeypatch)[0] == whole


def test_it_is_listed_and_cleaned_like_a_store(begun, tmp_path, monkeypatch) -> None:
    _, _, folder, _ = begun
    assert folder in {entry.path for entry in entries()}
