"""ggml's block types: against gguf's dequantization, ggml's own quantizer, and GPTQ's promise."""

import gguf
import numpy as np
import pytest
import torch

from evosweep.compressors.base import layer_error
from evosweep.compressors.formats import ggml_blocks
from evosweep.compressors.formats.ggml_layout import TYPES, Blocks, pack, unpack
from evosweep.compressors.ggml_fit import FitSettings, fit_blocks
from evosweep.compressors.ggml_types import GgmlTypes
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, statistics_of
from tests.engines.environment import run_engine


class TestCompensated(CompressorContract):
    def make(self) -> GgmlTypes:
        return GgmlTypes(types=["Q4_0", "Q5_1", "Q8_0", "F16"])


class TestRounded(CompressorContract):
    def make(self) -> GgmlTypes:
        return GgmlTypes(types=["IQ4_NL", "Q4_1", "Q5_0", "Q8_0"], compensate=False)


class TestUnmeasured(CompressorContract):
    def make(self) -> GgmlTypes:
        return GgmlTypes(types=["Q4_0", "BF16"], compensate=False, importance=False)


def random_blocks(name: str, count: int = 40) -> torch.Tensor:
    """Return bytes of blocks with any codes and scales, and fp16 numbers that are finite."""
    draws = torch.Generator().manual_seed(3)
    blocks = unpack(torch.randint(0, 256, (count, TYPES[name].size), generator=draws, dtype=torch.uint8), name)
    d = torch.randn(count, generator=draws).half()
    m = None if blocks.m is None else torch.randn(count, generator=draws).half()
    return pack(Blocks(blocks.codes, d, m, blocks.scales, blocks.minima), name)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "Q2_0"])  # which gguf does not have yet
def test_weights_are_bit_for_bit_those_of_gguf(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (TYPES[name].block, TYPES[name].size) and kind.value == TYPES[name].number
    stored = random_blocks(name)
    expected = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), kind))
    assert torch.equal(ggml_blocks.encode(stored, name).weight, expected)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_the_same_after_packing_again(name: str) -> None:
    stored = random_blocks(name)
    assert torch.equal(pack(unpack(stored, name), name), stored)


def test_q2_0_is_three_steps_up_and_one_down() -> None:
    stored = pack(Blocks(torch.arange(64)[None] % 4, torch.tensor([0.5], dtype=torch.float16)), "Q2_0")
    assert stored[0, 2:].tolist() == [0b11100100] * 16
    assert ggml_blocks.encode(stored, "Q2_0").weight[0, :4].tolist() == [-0.5, 0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def heavy_tailed() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (64, 512) with some large entries, and how much its columns count."""
    draws = torch.Generator().manual_seed(5)
    weight = torch.distributions.StudentT(4.0).sample((64, 512)) * 0 + torch.randn(64, 512, generator=draws)
    weight *= torch.randn(64, 512, generator=draws).abs().add(0.3) * 0.05
    return weight, torch.rand(512, generator=draws).pow(4) * 10


@pytest.mark.parametrize("name", TYPES)
def test_weighted_errors_are_below_those_of_ggml(name: str, heavy_tailed, tmp_path) -> None:
    """Both steered by the same importance of columns; ggml's as llama-quantize does it with an importance matrix."""
    weight, importance = heavy_tailed
    kind = TYPES[name]
    np.save(tmp_path / "weight.npy", weight.numpy())
    np.save(tmp_path / "importance.npy", importance.numpy())
    places = [tmp_path / f"{part}.npy" for part in ("weight", "importance")]
    run_engine("llama", "ggml_quantize", *places, kind.number, tmp_path / "blocks.npy")
    theirs = ggml_blocks.encode(torch.from_numpy(np.load(tmp_path / "blocks.npy")), name).weight
    ours = ggml_blocks.encode(pack(fit_blocks(weight, importance, kind, FitSettings()), name).view(64, -1), name).weight
    errors = [float(((made - weight).square() * importance).sum()) for made in (ours, theirs)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_compensation_lowers_the_output_error_of_k_types(name: str) -> None:
    draws = torch.Generator().manual_seed(6)
    inputs = torch.randn(2048, 256, generator=draws) @ torch.randn(256, 256, generator=draws)
    gram = inputs.T @ inputs / len(inputs)
    weight = torch.randn(32, 256, generator=draws)
    errors = {}
    for compensate in (False, True):
        compressor = GgmlTypes(types=[name], compensate=compensate)
        statistics = statistics_of(gram).only(compressor.needs)
        payload = compressor.compress({"a": weight}, statistics, compressor.plan({"a": (32, 256)}))["a"][name]
        errors[compensate] = layer_error(weight - payload.weight, gram)
        assert payload.output_error(weight, gram) == pytest.approx(errors[compensate], rel=2e-3)
    assert errors[True] < 0.8 * errors[False]


def test_types_whose_blocks_do_not_fit_are_replaced_and_said_once(caplog) -> None:
    compressor = GgmlTypes()
    shapes = {"one": (8, 576), "two": (8, 512)}
    plans = compressor.plan(shapes)
    assert [level.name for level in plans["one"]] == ["Q4_0", "Q5_0", "Q8_0"]
    assert [level.name for level in plans["two"]] == ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    assert [level.cost for level in plans["one"]] == [8 * 18 * 144, 8 * 18 * 176, 8 * 18 * 272]
    compressor.plan(shapes)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "576 inputs" in said[0] and "Q4_0 for Q2_K" in said[0]


@pytest.mark.parametrize("types", ["Q4_K", [], ["Q4_K", "Q4_K"], ["Q4"]])
def test_bad_types_are_refused(types: object) -> None:
    with pytest.raises(SettingError, match="types"):
        GgmlTypes(types=types)


def test_a_layer_that_nothing_fits_is_named() -> None:
    with pytest.raises(SettingError, match="odd, which has 40 inputs"):
        GgmlTypes().plan({"odd": (8, 40)})


def test_zeros_stay_zeros() -> None:
    for name, kind in TYPES.items():
        blocks = fit_blocks(torch.zeros(2, 256), torch.ones(256), kind, FitSettings())
        weight = ggml_blocks.encode(pack(blocks, name).view(2, -1), name).weight
        assert weight.abs().max() < 1e-5
