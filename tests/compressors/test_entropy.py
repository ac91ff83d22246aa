import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from evosweep.compressors.code_tables import LEAST, MOST, PAIRED, code_tables
from evosweep.compressors.entropy import EntropyCoded, Layer
from evosweep.compressors.formats import entropy_int
from evosweep.compressors.formats.entropy_int import Spreads
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.several import Several
from evosweep.core.errors import SettingError, StoreError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by

CPU = torch.device("cpu")


class TestEntropyCoded(CompressorContract):
    def make(self) -> EntropyCoded:
        return EntropyCoded(bits=[3, 3.5, 4.25, 6], column_block=8)


class TestBesideIntegers(CompressorContract):
    def make(self) -> Several:
        parts = {"coded": EntropyCoded(bits=[3.4, 5.5]), "plain": GPTQ(bits=[2, 8], group=16)}
        return Several(parts=parts, dominated=True)


def normal(rows: int, columns: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def spreads_of(rows: int, columns: int, widest: int) -> Spreads:
    draws = torch.Generator().manual_seed(1)
    return Spreads(
        rows=torch.randint(0, 16, (rows,), generator=draws),
        columns=torch.randint(-4, 4, (columns,), generator=draws),
        steps=torch.randint(0, 32, (columns,), generator=draws),
        widest=widest,
    )


@pytest.mark.parametrize("widest", [-30, 0, 8, 30, 60])
@pytest.mark.parametrize("rows", [16, 17])
def test_numbers_survive_coding_whatever_their_spread(widest: int, rows: int) -> None:
    spreads = spreads_of(rows, 40, widest)
    exponent = widest - spreads.rows[:, None] + (spreads.columns - spreads.steps)[None]
    numbers = (normal(rows, 40) * 2.0 ** (exponent / 4)).round().clamp(-30000, 30000).int()
    numbers[0, 0] = 30000  # far beyond any spread
    numbers[-1, 3] = -32768
    size = (
        math.ceil(int(entropy_int.coded_bits(numbers, spreads)) / 8) + entropy_int.side_bits(rows=rows, columns=40) // 8
    )
    tensors = entropy_int.encode(numbers=numbers, spreads=spreads, step=torch.tensor(0.5), size=size)
    assert sum(tensor.nbytes for tensor in tensors.values()) == size
    assert torch.equal(entropy_int.decode_numbers(tensors["codes"], spreads).int(), numbers)
    weight = entropy_int.decode(tensors, {"rows": rows, "columns": 40})
    assert torch.allclose(weight, numbers * 0.5 * 2.0 ** (spreads.steps / 4))
    with pytest.raises(StoreError, match="do not fit"):
        entropy_int.encode(numbers=numbers, spreads=spreads, step=torch.tensor(0.5), size=size - 1)


def test_words_fill_the_code_and_come_near_the_entropy() -> None:
    tables = code_tables(CPU)
    starts = [*tables.first.tolist(), len(tables.length)]
    for index, context in enumerate(range(LEAST, MOST + 1)):
        length = tables.length[starts[index] : starts[index + 1]]
        assert float((2.0 ** -length.double()).sum()) == 1.0  # Kraft: no word is another's beginning, none is missing
        spread = 2.0 ** (context / 4)
        edges = torch.arange(-1600.5, 1601, dtype=torch.float64) / spread
        share = 0.98 * torch.special.ndtr(edges).diff() + 0.02 * torch.special.ndtr(edges / 2.5).diff()
        entropy = float(-(share * share.clamp(min=1e-300).log2()).sum())
        most = (0.5 if context < -4 else 0.035) if context <= PAIRED else 0.065
        assert -0.005 < float(tables.rate[index]) - entropy < most  # what is behind an escape is not counted


def entropy_float64(weight, gram, *, steps, drawn, damping: float):
    """Round column by column to multiples of given steps, in float64, as GPTQ's Algorithm 1 without its batching.

    Values are divided by 1 + drawn before they are rounded.
    """
    weight, gram = weight.double().numpy().copy(), gram.double().numpy()
    upper = np.linalg.cholesky(np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))).T
    numbers = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        numbers[:, column] = np.round(weight[:, column] / steps[column] / (1 + drawn[:, column]))
        error = (weight[:, column] - numbers[:, column] * steps[column]) / upper[column, column]
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return numbers, np.diag(upper)


@pytest.mark.parametrize("bits", [2.5, 4])
def test_it_equals_a_float64_reference(bits: float) -> None:
    weight, gram = normal(48, 64), gram_of(64)
    payload = made_by(EntropyCoded(bits=[bits], column_block=16), {"a": weight}, gram)["a"][f"{bits}bit_coded"]
    exponents = entropy_int.unpack(payload.tensors["steps"], 5, 64).double().numpy()
    steps = float(payload.tensors["step"]) * 2.0 ** (exponents / 4)
    by_row = Layer.of(weight, gram).drawn(math.log2(float(payload.tensors["step"]))).double().numpy()
    drawn = np.outer(by_row, 2.0 ** (exponents / 2))
    numbers, pivots = entropy_float64(weight, gram, steps=steps, drawn=drawn, damping=0.01)
    assert np.abs(np.log2(steps / pivots) - np.log2(steps / pivots).mean()).max() < 0.3  # in proportion to the pivots
    made = payload.weight.numpy() / steps
    assert (np.round(made) == numbers).mean() >= 0.99
    difference = weight.numpy() - numbers * steps
    expected = float(((difference @ gram.numpy()) * difference).sum())
    assert payload.error == pytest.approx(expected, rel=0.01)


def test_all_bits_are_used_and_beat_grids_of_groups_at_equal_size() -> None:
    weight, gram = normal(128, 128), gram_of(128)
    plain = made_by(GPTQ(bits=[3], group=64), {"a": weight}, gram)["a"]["3bit"]
    bits = plain.bits / weight.numel()
    (coded,) = made_by(EntropyCoded(bits=[bits]), {"a": weight}, gram)["a"].values()
    assert plain.bits - 8 < coded.bits <= plain.bits
    assert coded.error < 0.5 * plain.error
    (less,) = made_by(EntropyCoded(bits=[bits - 0.4]), {"a": weight}, gram)["a"].values()
    assert coded.error < less.error < plain.error


def test_drawing_values_to_zero_is_the_best_trade_of_error_for_bits() -> None:
    spread, values = 0.8, torch.linspace(-6, 6, 2001, dtype=torch.float64)[:, None]
    numbers = torch.arange(-8, 9, dtype=torch.float64)
    bits = numbers.square() / (2 * math.log(2) * spread**2)
    best = numbers[((values - numbers).square() + 2 * math.log(2) / 12 * bits).argmin(dim=1)]
    assert torch.equal((values[:, 0] / (1 + 1 / (12 * spread**2))).round(), best)


def test_zeros_and_outliers_are_layers_too() -> None:
    weight = normal(32, 64)
    weight[3] *= 100
    weight[:, 5] *= 100
    weight[7] = 0
    made = made_by(EntropyCoded(bits=[3, 5]), {"zeros": torch.zeros(16, 64), "a": weight}, gram_of(64))
    assert all(float(payload.weight.abs().max()) == 0 for payload in made["zeros"].values())
    whole = float(((weight @ gram_of(64)) * weight).sum())
    assert made["a"]["5bit_coded"].error < 2e-3 * whole
    assert float(made["a"]["5bit_coded"].weight[7].abs().max()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": []}, "a list of numbers from 0.75 to 7"),
        ({"bits": [3, 2.5]}, "rising"),
        ({"bits": [0.5]}, "from 0.75 to 7"),
        ({"bits": ["3"]}, "from 0.75 to 7"),
        ({"bits": [2.5, 2.5]}, "each number once"),
        ({"damping": 0}, "damping"),
        ({"column_block": 0}, "column_block"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        EntropyCoded(**settings)


def test_a_level_without_room_for_its_codes_is_refused_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"bits must be at least 1\.\d+ for layers as small as a, got 0.8"):
        EntropyCoded(bits=[0.8, 4]).plan({"a": (16, 32)})


def test_inputs_of_very_different_size_keep_high_rates_worth_their_bits() -> None:
    gram = gram_of(64)
    strong = torch.ones(64)
    strong[7] = 300.0  # as channels of massive activations are: their columns need very fine steps
    gram *= torch.outer(strong, strong)
    made = made_by(EntropyCoded(bits=[4, 5, 6, 7]), {"a": normal(48, 64)}, gram)["a"]
    errors = [payload.error for payload in made.values()]
    assert all(3 < less / more < 6 for less, more in pairwise(errors))  # 6 dB a bit is 4


def test_planes_written_at_once_are_those_written_one_by_one() -> None:
    tables = code_tables(torch.device("cpu"))
    symbol = torch.randint(0, len(tables.length), (5000,), generator=torch.Generator().manual_seed(0))
    one_by_one = torch.cat(entropy_int._bit_planes(symbol, tables))
    assert torch.equal(entropy_int._bits_at_once(symbol, tables), one_by_one)
