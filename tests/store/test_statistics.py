import dataclasses

import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.magnitude import Magnitude
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.statistics import Statistics
from evosweep.core.errors import StoreError
from evosweep.store.build import StoreBuilder
from evosweep.store.statistics import input_square, second_moment, second_moment_diagonal
from evosweep.store.statistics.base import InputBatch
from evosweep.store.store_plan import plan_store
from evosweep.store.weighting import WEIGHTINGS


@pytest.mark.parametrize("weighting", ["relative", "plain"])
def test_measurements_are_means_over_tokens(weighting: str) -> None:
    inputs = torch.randn(4, 100, 200, generator=torch.Generator().manual_seed(0))
    inputs[0, 0] = 0
    rows = inputs.reshape(-1, 200).double()
    weights = (
        rows.square().sum(1).clamp(min=1e-24).reciprocal() if weighting == "relative" else torch.ones(400).double()
    )
    found = []
    for module in (second_moment, second_moment_diagonal, input_square):
        measurement = module.Measurement(columns=200, device=torch.device("cpu"))
        for batch in inputs:
            measurement.add(InputBatch(batch, WEIGHTINGS[weighting]))
        found.append(measurement.finish().double())
    moment = (rows * weights[:, None]).T @ rows / 400
    assert torch.allclose(found[0], moment, atol=1e-5)
    assert torch.allclose(found[1], moment.diagonal(), atol=1e-5)
    assert torch.allclose(found[2], rows.square().mean(0), atol=1e-5)


def test_what_is_not_declared_cannot_be_read() -> None:
    statistics = Statistics({"input_square": torch.ones(2)})
    assert torch.equal(statistics.input_square, torch.ones(2))
    with pytest.raises(StoreError, match="reads the statistic 'second_moment' but declares input_square"):
        _ = statistics.second_moment
    with pytest.raises(StoreError, match="declares none"):
        Statistics().get("x")


@pytest.mark.parametrize("compressor", [Magnitude(), RoundToNearest(group=16)], ids=["magnitude", "rtn"])
def test_no_second_moment_is_measured_where_nobody_needs_it(anatomy, splits, tmp_path, monkeypatch, compressor) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    monkeypatch.setattr(second_moment, "Measurement", None)  # whoever makes one fails
    plan = plan_store(anatomy, compressor)
    store = StoreBuilder(layer_errors=False).open(plan, splits["calibration"], model_name="tiny")
    assert all(level.error is None and level.relative_error is None for unit in store.units for level in unit.levels)
    assert all("outlier_ratio_m5" in unit.columns for unit in store.units)
    with pytest.raises(TypeError):
        StoreBuilder().open(plan, splits["calibration"], model_name="tiny")


def test_errors_that_need_no_further_measurement_are_recorded(anatomy, splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    plan = plan_store(anatomy, GPTQ(bits=[2, 4], group=16))
    stores = [
        StoreBuilder(layer_errors=errors).open(plan, splits["calibration"], model_name="tiny")
        for errors in (True, False)
    ]
    assert stores[0].key != stores[1].key
    assert stores[0].units == stores[1].units


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"second_momnet"}, r"no statistic 'second_momnet' \(did you mean 'second_moment'\?\)"),
        ({"no.such.module"}, "no statistic 'no.such.module'"),
        ({"evosweep.core.files"}, "is no statistic"),
        ("second_moment", "must be a set of names"),
        (None, "must be a set of names"),
    ],
)
def test_unknown_needs_are_named_before_any_work(anatomy, needs, message: str) -> None:
    compressor = RoundToNearest(group=16)
    compressor.needs = needs
    with pytest.raises(StoreError, match=message):
        plan_store(anatomy, compressor)


def test_a_plan_asks_the_compressor_once(anatomy, splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    asked = []

    class Counting(RoundToNearest):
        def plan(self, shapes):
            asked.append(len(shapes))
            return super().plan(shapes)

    plan = plan_store(anatomy, Counting(bits=[2, 4], group=16))
    store = StoreBuilder().open(plan, splits["calibration"], model_name="tiny")
    assert asked == [len(anatomy.slots)]
    measured = [dataclasses.replace(level, error=None, relative_error=None) for level in store.units[0].levels]
    assert tuple(measured) == plan.units[0].levels and plan.fixed_bits == store.fixed_bits
