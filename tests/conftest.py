"""Small real things that many tests share: a tiny model, its text, its level store."""

import os
from pathlib import Path

import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.core.problem import Problem
from evosweep.evaluate.population import Evaluator
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import plan_store
from evosweep.testing.problems import make_problem
from evosweep.testing.tiny import tiny_model, tiny_splits

torch.set_num_threads(1)  # two pytest workers share two cores


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Level stores of tests go to a folder of their own; downloads are kept between runs."""
    os.environ.setdefault("EVOSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return tiny_model()


@pytest.fixture(scope="session")
def anatomy(loaded: LoadedModel) -> Anatomy:
    return Anatomy(loaded.model)


@pytest.fixture(scope="session")
def splits(loaded: LoadedModel) -> dict:
    return tiny_splits(loaded)


@pytest.fixture(scope="session")
def store(anatomy: Anatomy, splits: dict) -> LevelStore:
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16))
    return StoreBuilder().open(plan, splits["calibration"], model_name="tiny")


@pytest.fixture(scope="session")
def evaluator(anatomy: Anatomy, splits: dict, store: LevelStore) -> Evaluator:
    return Evaluator(anatomy=anatomy, store=store, splits=splits)


@pytest.fixture
def problem() -> Problem:
    """Twelve units of three sizes in four blocks, at what 3 bits everywhere cost."""
    return make_problem()


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
