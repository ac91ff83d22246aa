"""Small real things that many tests share: a tiny model, its text, its level store."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.data.documents import Document
from evosweep.data.tokens import Windows
from evosweep.evaluate.population import Evaluator
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel, Random
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import plan_store

torch.set_num_threads(1)  # two pytest workers share two cores
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU

PHRASE = "the layer that matters most is not always the first one but it often helps to look there before others do"
WORDS = PHRASE.split()


class Prose:
    """Documents of random words: enough to count, split and tokenize."""

    def __init__(self, count: int = 40, words: int = 120) -> None:
        self.count, self.words = count, words

    def documents(self, *, progress: object) -> list[Document]:
        rng = np.random.default_rng(7)
        return [Document(f"doc/{n}", " ".join(rng.choice(WORDS, self.words))) for n in range(self.count)]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Level stores of tests go to a folder of their own; downloads are kept between runs."""
    os.environ.setdefault("EVOSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))


def tiny_config(**changes: int) -> object:
    import transformers

    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    from evosweep.core.events import Silent

    return Random(name="tiny", config=tiny_config, spread=0.15, device="cpu").load(progress=Silent())


@pytest.fixture(scope="session")
def anatomy(loaded: LoadedModel) -> Anatomy:
    return Anatomy(loaded.model)


@pytest.fixture(scope="session")
def splits(loaded: LoadedModel) -> dict:
    shares = {"validation": 0.2, "search": 0.3, "calibration": 0.5}
    windows = Windows(seq_len=32, calibration=1024, validation=256, shares=shares)
    return windows.split(Prose(), loaded.tokenizer)


@pytest.fixture(scope="session")
def store(anatomy: Anatomy, splits: dict) -> LevelStore:
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16))
    return StoreBuilder().open(plan, splits["calibration"], model_name="tiny")


@pytest.fixture(scope="session")
def evaluator(anatomy: Anatomy, splits: dict, store: LevelStore) -> Evaluator:
    return Evaluator(anatomy=anatomy, store=store, splits=splits)


def ladder(numel: int, bits: tuple[int, ...] = (2, 3, 4)) -> tuple[Level, ...]:
    return tuple(
        Level(
            f"{b}bit",
            cost=numel * b + 19,
            error=numel * 4.0**-b,
            relative_error=4.0**-b,
            nominal=Nominal("bits", float(b)),
        )
        for b in bits
    )


@pytest.fixture
def problem() -> Problem:
    """Twelve units of three sizes in four blocks, at what 3 bits everywhere cost."""
    return make_problem()


def make_problem(budget: int | None = None, **columns: float) -> Problem:
    units = tuple(
        Unit(
            f"blocks.{n // 3}.linear_{n % 3}",
            numel,
            n // 3,
            ladder(numel),
            {
                "outlier_ratio_m5": 0.01 * (n // 3),
                "kl_per_error": 1.0 + n,
                "hill_exponent": 3.0 - 0.1 * n,
                **{f"kl_around_top/{level.name}": (1.0 + n) * float(level.error or 0) for level in ladder(numel)},
                **columns,
            },
        )
        for n, numel in enumerate((100, 100, 300) * 4)
    )
    bits = sum(unit.levels[1].cost for unit in units) if budget is None else budget
    return Problem(units=units, budget=bits, fixed_bits=800)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def make_store_problem():
    def make(store: LevelStore) -> Problem:
        bits = sum(unit.levels[1].cost for unit in store.units)
        return Problem(units=store.units, budget=bits, fixed_bits=store.fixed_bits)

    return make
