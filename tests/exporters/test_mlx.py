import pytest
import torch
from safetensors.torch import load_file

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.exporters.bit_stream import pack_words, unpack_words
from evosweep.exporters.integer_layers import IntegerLayer
from evosweep.exporters.mlx import MLX
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.store.store_plan import plan_store
from tests.exporters.integer_contract import IntegerContract, assert_scored, logits_of, tensor_bytes
from tests.models.test_anatomy import small

WIDTHS = (2, 3, 4, 5, 6, 8)


class MLXContract(IntegerContract):
    """The contract, and what mlx-lm says of the same folder."""

    widths = WIDTHS

    def make(self) -> MLX:
        return MLX(check_tokens=16)

    def test_mlx_gives_what_was_scored(self, exported, evaluator, genome, splits, store, tmp_path) -> None:
        tokens = splits["search"].windows[:2]
        logits, facts = logits_of("mlx", tmp_path / "model", tokens)
        assert_scored(logits, tokens, evaluator, genome)
        assert facts["layers"] == {
            unit.name: [WIDTHS[genome[index]], self.group] for index, unit in enumerate(store.units)
        }

    def test_codes_scales_and_size_are_those_of_the_store(self, exported, genome, store, problem, tmp_path) -> None:
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        counted = 0
        for index, unit in enumerate(store.units):
            layer = IntegerLayer.of(store.payload(unit.name, unit.levels[genome[index]].name))
            assert torch.equal(unpack_words(tensors[f"{unit.name}.weight"], layer.width), layer.codes)
            assert torch.equal(tensors[f"{unit.name}.scales"], layer.scales)
            zeros = -tensors[f"{unit.name}.biases"].float() / layer.scales.float()
            assert (zeros - layer.zeros.float()).abs().max() <= (0 if self.symmetric else 1e-4)
            own = 0 if self.symmetric else layer.width
            counted += unit.levels[genome[index]].cost + layer.zeros.numel() * (32 - own)
        assert 8 * tensor_bytes(tmp_path / "model") == counted + problem.fixed_bits


class TestAsymmetric(MLXContract):
    pass


class TestSymmetricAndTied(MLXContract):
    symmetric = True
    group = 64


@pytest.mark.parametrize("width", range(1, 9))
def test_a_stream_is_what_its_bits_spell(width: int) -> None:
    codes = torch.randint(0, 2**width, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    words = pack_words(codes, width)
    for row, packed in zip(codes, words, strict=True):
        spelled = sum(int(code) << (place * width) for place, code in enumerate(row))
        assert int.from_bytes(packed.numpy().astype("<i4").tobytes(), "little") == spelled
    assert torch.equal(unpack_words(words, width), codes)
    with pytest.raises(ValueError, match="a multiple of 32"):
        pack_words(codes[:, :40], width)


@pytest.mark.parametrize(
    ("compressor", "drop", "family", "dtype", "message"),
    [
        (GPTQ(group=16), Drop(), "llama", "float32", r"'groups of 16 of model\.layers\.0\.self_attn\.q_proj'"),
        (GPTQ(group=16), Drop(), "llama", "float32", r"groups of 32, 64, 128; the nearest that fits is 32"),
        (SparseGPT(), Drop(), "llama", "float32", r"it holds bit-widths in groups"),
        (GPTQ(group=32), Drop(), "llama", "bfloat16", r"compressor\.symmetric=true compressor\.coarse_scales=true"),
        (GPTQ(group=32), Drop(granularity="sublayers"), "llama", "float16", "drop=blocks"),
        (GPTQ(group=32), Drop(), "gpt2", "float32", "transposed"),
    ],
)
def test_what_has_no_place_in_the_format_is_told_before_any_work(
    compressor, drop, family: str, dtype: str, message: str
) -> None:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} if family == "gpt2" else {}
    anatomy = Anatomy(small(family, intermediate_size=64, **sizes).to(getattr(torch, dtype)))
    with pytest.raises(SettingError, match=message):
        MLX().check(compressor, drop, anatomy)


def test_seven_bits_are_told_before_the_search_with_what_fits() -> None:
    anatomy = Anatomy(small("llama", intermediate_size=64))
    units = plan_store(anatomy, RoundToNearest(bits=[4, 6, 7], group=32)).units
    message = (
        r"this one holds 1, 2, 3, 4, 5, 6, 8 bits; the nearest that fits is 6bit, "
        r"got '7bit of model\.layers\.0\.self_attn\.q_proj'"
    )
    with pytest.raises(SettingError, match=message):
        MLX().check_problem(Budget(as_uniform=6).problem(units), anatomy)
