import numpy as np
import pytest
import torch

from evosweep.compressors.compensate import factorize
from evosweep.compressors.formats import grouped_int
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import SettingError, StoreError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by


class TestGPTQ(CompressorContract):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 3, 4, 8], group=8)


class TestSymmetricGPTQ(CompressorContract):
    def make(self) -> GPTQ:
        return GPTQ(bits=[2, 4], group=16, symmetric=True)


class TestRoundToNearest(CompressorContract):
    def make(self) -> RoundToNearest:
        return RoundToNearest(bits=[2, 3, 5, 6], group=16)


class TestWholeRows(CompressorContract):
    def make(self) -> RoundToNearest:
        return RoundToNearest(bits=[3, 4], group=None)


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_survive_packing(width: int) -> None:
    codes = torch.randint(0, 2**width, (7, 13), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    planes = grouped_int.pack(codes, width)
    assert planes.shape == (width, -(-91 // 8))
    assert torch.equal(grouped_int.unpack(planes, width, 91).view(7, 13), codes)


def gptq_float64(weight, gram, *, width: int, group: int, damping: float, symmetric: bool):
    """GPTQ straight from the paper (Algorithm 1 without its batching), one column at a time in float64."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy().copy()
    gram += damping * np.diag(gram).mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    top, codes = 2**width - 1, np.zeros_like(weight)
    for column in range(weight.shape[1]):
        if column % group == 0:
            block = weight[:, column : column + group]
            low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
            if symmetric:
                high = np.maximum(-low, high)
                low = -high
            scale = ((high - low) / top).astype(np.float16).astype(np.float64)
            zero = np.full(len(scale), (top + 1) / 2) if symmetric else np.clip(np.round(-low / scale), 0, top)
        codes[:, column] = np.clip(np.round(weight[:, column] / scale + zero), 0, top)
        error = (weight[:, column] - (codes[:, column] - zero) * scale) / upper[column, column]
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return codes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("width", "group", "block"), [(2, 16, 8), (3, 16, 128), (4, 32, 5), (8, 64, 32)])
def test_gptq_equals_a_float64_reference(width: int, group: int, block: int, symmetric: bool) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    gram = gram_of(64)
    compressor = GPTQ(bits=[2, 3, 4, 5, 8], group=group, symmetric=symmetric, column_block=block)
    payload = made_by(compressor, {"a": weight}, gram)["a"][f"{width}bit"]
    codes = grouped_int.unpack(payload.tensors["codes"], width, weight.numel()).view(48, 64).numpy()
    expected = gptq_float64(weight, gram, width=width, group=group, damping=0.01, symmetric=symmetric)
    assert (codes == expected).mean() >= 0.99


def test_gptq_beats_rounding_where_inputs_have_structure() -> None:
    weight, gram = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), gram_of(64)
    errors = []
    for compressor in (GPTQ(bits=[3], group=16), RoundToNearest(bits=[3], group=16)):
        difference = weight - made_by(compressor, {"a": weight}, gram)["a"]["3bit"].weight
        errors.append(float(((difference @ gram) * difference).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_dead_inputs_get_zero_weights_and_do_no_harm() -> None:
    gram = gram_of(32)
    gram[5], gram[:, 5] = 0, 0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    made = made_by(GPTQ(bits=[4], group=32), {"a": weight}, gram)["a"]["4bit"].weight
    assert torch.isfinite(made).all() and float(made[:, 5].abs().max()) == 0


def test_the_factor_is_what_the_paper_asks() -> None:
    gram = gram_of(16)
    upper = factorize(gram, damping=0.01).upper
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(16)
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped), atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_singular_second_moments_are_damped_until_they_factorize() -> None:
    one = torch.ones(16, 16)
    assert torch.isfinite(factorize(one, damping=1e-9).upper).all()


def test_second_moments_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(StoreError, match=r"calibration"):
        factorize(torch.full((4, 4), float("nan")), damping=0.01)


def test_all_zero_weights_stay_zero() -> None:
    made = made_by(GPTQ(bits=[2, 3], group=8), {"a": torch.zeros(4, 16)}, gram_of(16))["a"]
    assert all(float(payload.weight.abs().max()) == 0 for payload in made.values())


def test_three_bits_in_groups_of_64_cost_what_they_take() -> None:
    ((plan,),) = GPTQ(bits=[3], group=64).plan({"a": (576, 576)}).values()
    assert plan.cost / 576**2 == pytest.approx(3 + (16 + 3) / 64)
    ((plan,),) = GPTQ(bits=[3], group=64, symmetric=True).plan({"a": (576, 576)}).values()
    assert plan.cost / 576**2 == pytest.approx(3 + 16 / 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": []}, r"bits"),
        ({"bits": [4, 3]}, "rising"),
        ({"bits": [3, 3]}, "rising"),
        ({"bits": [1]}, "from 2 to 8"),
        ({"bits": ["3"]}, "from 2 to 8"),
        ({"group": 0}, r"group"),
        ({"damping": 0}, r"damping"),
        ({"symmetric": "yes"}, "true or false"),
        ({"column_block": 0}, "column_block"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GPTQ(**settings)


def test_a_group_that_does_not_divide_is_told_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"group must be null or a divisor .* 1 layers \(a .* 100"):
        GPTQ(group=64).plan({"a": (10, 100)})
