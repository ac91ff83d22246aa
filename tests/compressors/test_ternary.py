import numpy as np
import pytest
import torch

from evosweep.compressors.formats import base3
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.several import Several
from evosweep.compressors.ternary import Ternary, scale_of
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by


class TestCompensated(CompressorContract):
    def make(self) -> Ternary:
        return Ternary(groups=["tensor", 8], column_block=8)


class TestBesideIntegers(CompressorContract):
    def make(self) -> Several:
        parts = {"ternary": Ternary(groups=["row"]), "plain": GPTQ(bits=[3, 8], group=16)}
        return Several(parts=parts, dominated=True)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("scale", "measure"), [("mean", torch.Tensor.mean), ("median", torch.Tensor.median)])
@pytest.mark.parametrize("group", ["tensor", "row", 16])
def test_without_compensation_it_is_the_papers_rounding(scale: str, measure, group) -> None:
    weight = normal(7, 48)
    compressor = Ternary(groups=[group], scale=scale, compensate=False)
    assert compressor.needs == frozenset()
    (payload,) = made_by(compressor, {"a": weight}, gram_of(48))["a"].values()
    parts = weight.reshape(1, 1, -1) if group == "tensor" else weight.view(7, -1, 48 if group == "row" else 16)
    gamma = (
        torch.stack([torch.stack([measure(part.abs()) for part in row]) for row in parts]).half().float()[:, :, None]
    )
    expected = (parts / gamma).round().clamp(-1, 1) * gamma
    assert torch.equal(payload.weight, expected.view(7, 48))


def ternary_float64(weight, gram, scale, *, damping: float):
    """Round column by column, in float64 (GPTQ's Algorithm 1)."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy()
    upper = np.linalg.cholesky(np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))).T
    for column in range(weight.shape[1]):
        value = np.clip(np.round(weight[:, column] / scale), -1, 1) * scale
        weight[:, column + 1 :] -= np.outer(
            (weight[:, column] - value) / upper[column, column], upper[column, column + 1 :]
        )
        weight[:, column] = value
    return weight


def test_it_equals_a_float64_reference() -> None:
    weight, gram = normal(48, 64), gram_of(64)
    (payload,) = made_by(Ternary(groups=["row"], column_block=16), {"a": weight}, gram)["a"].values()
    made = ternary_float64(weight, gram, scale_of(weight, "least_squares").double().numpy(), damping=0.01)
    assert np.isclose(payload.weight.numpy(), made, atol=1e-6).mean() >= 0.99
    difference = weight.numpy() - made
    assert payload.error == pytest.approx(float(((difference @ gram.numpy()) * difference).sum()), rel=0.01)


def test_least_squares_beats_mean_and_median() -> None:
    weight = normal(4, 5000)
    errors = {}
    for kind in ("mean", "median", "least_squares"):
        scale = scale_of(weight, kind)[:, None]
        errors[kind] = float((weight - (weight / scale).round().clamp(-1, 1) * scale).square().mean())
    assert errors["least_squares"] == pytest.approx(0.190, abs=0.01)  # Lloyd's three levels of the normal distribution
    assert errors["least_squares"] < errors["mean"] < errors["median"]


@pytest.mark.parametrize("columns", [5, 7, 64])
def test_codes_survive_packing_at_five_a_byte(columns: int) -> None:
    codes = torch.randint(0, 3, (9, columns), generator=torch.Generator().manual_seed(1))
    tensors = base3.encode(codes=codes, scales=torch.ones(9, 1))
    assert tensors["codes"].numel() == -(-9 * columns // 5)
    assert torch.equal(base3.decode(tensors, {"rows": 9, "columns": columns}).int(), codes.int() - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": []}, "groups"),
        ({"groups": ["rows"]}, "did you mean 'row'"),
        ({"groups": [0]}, "groups"),
        ({"groups": ["row", "row"]}, "each once"),
        ({"scale": "average"}, "scale"),
        ({"compensate": 1}, "true or false"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Ternary(**settings)


def test_a_group_that_does_not_divide_is_named_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"groups must be a divisor .* 1 layers \(a .* 100"):
        Ternary(groups=["row", 64]).plan({"a": (10, 100)})
