import copy

import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.events import Silent
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import Random
from evosweep.store import calibrate
from evosweep.store.build import StoreBuilder
from evosweep.store.calibrate import calibration_memory
from evosweep.store.store_plan import plan_store

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def scored(offload: bool) -> tuple[Anatomy, list[float], str]:
    source = Random(name="r", config=lambda: transformers.LlamaConfig(**CONFIG), offload=offload, device="cpu")
    anatomy = Anatomy(source.load(progress=Silent()).model)
    rng = np.random.default_rng(0)
    splits = {name: TokenSplit(name, rng.integers(0, 256, (4, 16)), ("x",)) for name in ("calibration", "search")}
    store = StoreBuilder().open(plan_store(anatomy, GPTQ(bits=[2, 4], group=16)), splits["calibration"], model_name="r")
    genomes = rng.integers(0, 2, (5, len(store.units)))
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    return anatomy, evaluator.score(genomes, split="search", windows=[0, 1], fitness=[KL()])["kl"].tolist(), store.key


def test_blocks_that_only_visit_give_the_same_store_and_scores(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "one"))
    _, plain, key = scored(False)
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "two"))
    _, visiting, other = scored(True)
    assert visiting == plain and other == key


def test_visitors_go_home_whatever_happens() -> None:
    source = Random(name="r", config=lambda: transformers.LlamaConfig(**CONFIG), offload=True, device="cpu")
    anatomy = Anatomy(source.load(progress=Silent()).model)
    here = [parameter.data_ptr() for parameter in anatomy.blocks.parameters()]
    with pytest.raises(RuntimeError):
        anatomy.run_block(0, torch.zeros((1, 8, 7)))  # no such width
    assert [parameter.data_ptr() for parameter in anatomy.blocks.parameters()] == here
    assert not any("_homes" in vars(block) for block in anatomy.blocks)


@pytest.mark.parametrize(("gigabytes", "home"), [(80, "cuda"), (1, "cpu")])
def test_activations_stay_on_the_device_while_they_fit(anatomy, monkeypatch, gigabytes: int, home: str) -> None:
    there = copy.copy(anatomy)
    there.device = torch.device("cuda", 0)
    monkeypatch.setattr(calibrate, "free_bytes", lambda device: gigabytes * 10**9)
    width = anatomy.head.weight.shape[1] * anatomy.dtype.itemsize
    room = calibration_memory(there, 10**9 // width)
    assert room.home.type == home and room.batch_tokens == 65536


def test_a_batch_is_no_larger_than_free_memory_allows(anatomy, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "free_bytes", lambda device: 10**6)
    few = calibration_memory(anatomy, 64).batch_tokens
    monkeypatch.setattr(calibrate, "free_bytes", lambda device: 10**9)
    assert few < 4096 == calibration_memory(anatomy, 64).batch_tokens
