from typing import Any

import numpy as np
import pytest
import torch

from evosweep.compressors.adaquant import AdaQuant, joined
from evosweep.compressors.descent import descend, fit_scale
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rounding import Learned, Rounding, Target
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by


class TestAdaQuant(CompressorContract):
    def make(self) -> AdaQuant:
        return AdaQuant(bits=[2, 3, 4, 8], group=8, sweeps=2)


class TestSymmetricAdaQuant(CompressorContract):
    def make(self) -> AdaQuant:
        return AdaQuant(bits=[2, 4], group=None, symmetric=True, sweeps=2, column_block=8)


class TestByGradient(CompressorContract):
    def make(self) -> AdaQuant:
        return AdaQuant(bits=[2, 3, 5], group=16, method="gradient", steps=10, start="nearest", grid="mse")


def weights_of(rows: int = 24) -> dict[str, torch.Tensor]:
    return {"layer": torch.randn(rows, 32, generator=torch.Generator().manual_seed(3))}


def descend_float64(rounding: Rounding, weight: np.ndarray, gram: np.ndarray, *, group: int) -> np.ndarray:
    """One sweep of codes straight from QuantEase's equation 8, in float64: rows of weights, no running gradient."""
    codes = rounding.codes.double().numpy().copy()
    for column in range(len(codes)):
        scale = rounding.scale[column // group].double().numpy()
        zero = rounding.zero[column // group].double().numpy()
        for row in range(codes.shape[1]):
            values = [(codes[k, row] - rounding.zero[k // group, row].item()) for k in range(len(codes))]
            values = np.array(values) * rounding.scale[:, row].double().numpy().repeat(group)
            others = weight[:, row] - values
            others[column] = 0
            wanted = weight[column, row] + gram[column] @ others / gram[column, column]
            codes[column, row] = np.clip(np.round(wanted / scale[row] + zero[row]), 0, rounding.top[row].item())
    return codes


def start_of(width: int, *, group: int, rows: int = 6) -> tuple[Rounding, Target]:
    weight = weights_of(rows)["layer"]
    nearest = RoundToNearest(bits=[width], group=group)
    payload = made_by(nearest, {"layer": weight}, gram_of(32))["layer"][f"{width}bit"]
    return joined([payload], [rows]), Target(weight.T.contiguous(), gram_of(32), 0.0)


@pytest.mark.parametrize(("width", "group", "block"), [(2, 8, 64), (3, 32, 8), (4, 16, 5)])
def test_a_sweep_of_codes_equals_a_float64_reference(width: int, group: int, block: int) -> None:
    start, target = start_of(width, group=group)
    expected = descend_float64(start, target.weight.double().numpy(), target.gram.double().numpy(), group=group)
    found = descend(start.clone(), target, sweeps=1, learned=Learned(scales=False), column_block=block)
    assert (found.codes.numpy() == expected).mean() >= 0.99
    assert not torch.equal(found.codes, start.codes)


def test_a_fitted_scale_is_the_least_squares_one() -> None:
    start, target = start_of(3, group=8)
    gradient = target.gram @ (target.weight - start.values())
    found = start.clone()
    local = gradient[8:16].clone()
    fit_scale(found, 1, target.gram[8:16, 8:16], local, Learned())
    for row in range(6):
        basis = np.zeros(32)
        basis[8:16] = (start.codes[8:16, row] - start.zero[1, row]).numpy()
        rest = (target.weight - start.values())[:, row].double().numpy() + basis * start.scale[1, row].item()
        gram = target.gram.double().numpy()
        assert found.scale[1, row].item() == pytest.approx(basis @ gram @ rest / (basis @ gram @ basis), rel=1e-3)
    assert torch.allclose(local, (target.gram @ (target.weight - found.values()))[8:16], atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"learn": ["rounding"]}, {"learn": ["scales"]}, {"method": "gradient"}])
@pytest.mark.parametrize("plain", [{}, {"order": "activation", "grid": "mse"}])
def test_what_is_learned_is_better_than_the_start_row_by_row(settings: dict[str, Any], plain: dict[str, Any]) -> None:
    gram = gram_of(32)
    weights = weights_of()
    plain = {"bits": [2, 3, 4], "group": 16, **plain}
    start = made_by(GPTQ(**plain), weights, gram)["layer"]
    learned = made_by(AdaQuant(**plain, **settings), weights, gram)["layer"]
    for level in start:
        errors = []
        for payload in (start[level], learned[level]):
            difference = weights["layer"] - payload.weight
            errors.append(((difference @ gram) * difference).sum(dim=1))
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        assert errors[1].sum() < errors[0].sum()


def test_what_is_not_learned_stays() -> None:
    weights = weights_of()
    plain = {"bits": [3], "group": 16}
    start = made_by(GPTQ(**plain), weights, gram_of(32))["layer"]["3bit"]
    codes = made_by(AdaQuant(**plain, learn=["rounding"]), weights, gram_of(32))["layer"]["3bit"]
    scales = made_by(AdaQuant(**plain, learn=["scales"]), weights, gram_of(32))["layer"]["3bit"]
    assert torch.equal(codes.tensors["scales"], start.tensors["scales"])
    assert torch.equal(codes.tensors["zeros"], start.tensors["zeros"])
    assert torch.equal(scales.tensors["codes"], start.tensors["codes"])
    assert not torch.equal(scales.tensors["scales"], start.tensors["scales"])


def test_more_sweeps_never_harm() -> None:
    errors = [
        made_by(AdaQuant(bits=[2], group=8, sweeps=sweeps), weights_of(), gram_of(32))["layer"]["2bit"].error
        for sweeps in (1, 2, 4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]


def test_coarse_scales_stay_coarse() -> None:
    levels = made_by(AdaQuant(bits=[3], group=8, coarse_scales=True), weights_of(), gram_of(32))["layer"]
    scales = levels["3bit"].tensors["scales"]
    assert torch.equal(scales, scales.bfloat16().half())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "gptk"}, "start must be"),
        ({"method": "adam"}, "method must be"),
        ({"sweeps": 0}, "sweeps must be"),
        ({"steps": 0}, "steps must be"),
        ({"learn": []}, "learn must be"),
        ({"learn": ["rounding", "rounding"]}, "learn must be"),
        ({"learn": ["roundings"]}, "did you mean"),
        ({"group": 0}, "group must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        AdaQuant(**settings)
