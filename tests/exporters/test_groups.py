"""Exports of layers whose groups differ in size, as ``compressor.group=auto`` makes them."""

import numpy as np
import pytest

from evosweep.api import build_store
from evosweep.compressors.gptq import GPTQ
from evosweep.core.errors import SettingError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.exporters.auto_round import AutoRound
from evosweep.exporters.gptq_v2 import GPTQv2
from evosweep.exporters.mlx import MLX
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel, Random
from evosweep.testing.tiny import tiny_config, tiny_splits
from evosweep.workbench import Workbench


def model_of(width: int) -> LoadedModel:
    config = {"hidden_size": 64, "intermediate_size": width}
    return Random(name="uneven", config=lambda: tiny_config(**config), spread=0.15, device="cpu").load(
        progress=Silent()
    )


@pytest.fixture(scope="module")
def bench() -> Workbench:
    """Inputs of 64 columns in one group, and of 96 in groups of 32."""
    loaded = model_of(96)
    return build_store(loaded, tiny_splits(loaded), GPTQ(bits=[4, 8], group="auto", symmetric=True))


@pytest.mark.parametrize("exporter", [PackedSafetensors(), CompressedTensors(), MLX(), GPTQv2(), AutoRound()], ids=repr)
def test_each_layer_keeps_its_group(bench: Workbench, exporter, tmp_path) -> None:
    exporter.check(bench.compressor, Drop(), bench.anatomy)
    units = bench.store.units
    groups = {unit.name: bench.store.payload(unit.name, "4bit").meta["group"] for unit in units}
    assert groups == {unit.name: 32 if unit.name.endswith("down_proj") else 64 for unit in units}
    problem = Problem(units=units, budget=sum(unit.levels[1].cost for unit in units), fixed_bits=bench.store.fixed_bits)
    genome = np.random.default_rng(0).integers(0, 2, len(units))
    facts = exporter.export(
        genome, problem=problem, evaluator=bench.evaluator, loaded=bench.loaded, folder=tmp_path / "model"
    )
    assert facts["max_logit_difference"] <= 1e-4


def test_a_group_that_a_format_does_not_hold_is_said_before_the_search() -> None:
    anatomy = Anatomy(model_of(100).model)
    compressor = GPTQ(bits=[4, 8], group="auto", symmetric=True)
    PackedSafetensors().check(compressor, Drop(), anatomy)
    with pytest.raises(SettingError, match=r"32, 64, 128.*, got 'groups of 100 of model.layers.0.mlp.down_proj'"):
        MLX().check(compressor, Drop(), anatomy)
