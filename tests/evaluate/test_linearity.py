"""HIGGS's linearity model against a plain float64 version."""

import copy

import numpy as np
import pytest
import torch

from evosweep.allocators.harm import HIGGS, HIGGS_DATA
from evosweep.allocators.ilp import ILP
from evosweep.core.events import Silent
from evosweep.evaluate.linearity import NOISES, NoisedKL, fitted_slope, noised_weight
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.sensitivity import measure


def kl_of(model: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (each(input_ids=ids, use_cache=False).logits.log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("place", [-1, 0, 5, 14])
def test_the_kl_of_noise_is_that_of_float64(evaluator: Evaluator, splits: dict, place: int) -> None:
    anatomy = evaluator.anatomy
    slot = anatomy.all_slots[place % len(anatomy.all_slots)]
    ids = torch.from_numpy(splits["search"].windows[:2])
    dense = copy.deepcopy(anatomy.model).double()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.get_parameter(f"{slot.name}.weight").copy_(noised_weight(slot.read(), 0.05, 9))
    before = slot.read().clone()
    assert NoisedKL(anatomy, ids).of(slot, 0.05, 9) == pytest.approx(kl_of(dense, other, ids), rel=1e-3)
    assert torch.equal(slot.read(), before)


def test_noise_has_the_norm_that_is_asked_for() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) + 0.3
    change = noised_weight(weight, 0.02, 1) - weight
    assert float(change.square().sum() / weight.square().sum()) == pytest.approx(0.02, rel=0.02)


def test_a_slope_is_that_of_least_squares() -> None:
    kl = [0.031, 0.118]
    (expected,), *_ = np.linalg.lstsq(np.array(NOISES)[:, None], np.array(kl), rcond=None)
    assert fitted_slope(NOISES, kl) == pytest.approx(expected)
    assert fitted_slope(NOISES, [-0.01, -0.01]) == 0.0
    assert fitted_slope(NOISES, [0.01, float("nan")]) > 1e3


@pytest.mark.parametrize("column", [HIGGS, HIGGS_DATA])
def test_harm_is_the_slope_times_the_squared_relative_error(
    column: str, evaluator: Evaluator, store, make_store_problem, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    columns, tokens = measure(column, evaluator, problem, tokens=64, seed=0, progress=Silent())
    assert tokens == (2 * len(problem.units) + 1) * 32
    for index, unit in enumerate(problem.units):
        dense = evaluator.anatomy.slots[index].read().double()
        errors = [float((evaluator.weight(index, level) - dense).square().sum()) for level in range(3)]
        harms = [columns[unit.name][f"{column}/{level.name}"] for level in unit.levels]
        assert np.array(harms) / harms[0] == pytest.approx(np.array(errors) / errors[0])
    units = [type(unit)(**{**vars(unit), "columns": columns[unit.name]}) for unit in problem.units]
    measured = type(problem)(units=tuple(units), budget=problem.budget)
    assert measured.feasible(ILP(harm=column).allocate(measured))
