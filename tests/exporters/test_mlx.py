import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.exporters.bit_stream import pack_words, unpack_words
from evosweep.exporters.integer_layers import IntegerLayer
from evosweep.exporters.mlx import MLX
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.engines.environment import run_engine
from tests.exporters.integer_contract import IntegerContract, assert_scored, logits_of, tensor_bytes
from tests.models.test_anatomy import small
from tests.models.test_dropping import NoTokenizer
from tests.models.test_dropping import splits as two_splits

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

    def test_codes_scales_and_size_are_those_of_the_store(
        self, exported, genome, store, problem, evaluator, tmp_path
    ) -> None:
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
        assert self.make().expected_bytes(Winner(genome, problem, evaluator)) == tensor_bytes(tmp_path / "model")


FAMILIES = {
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": {},
    "granite": {},
    "starcoder2": {},
    "smollm3": {},
}


def test_other_families_give_what_was_scored(tmp_path) -> None:
    texts, scored = two_splits(), {}
    tokens = texts["search"].windows[:2]
    for family, more in FAMILIES.items():
        torch.manual_seed(0)
        anatomy = Anatomy(small(family, hidden_size=64, intermediate_size=96, **more).half().float())
        compressor = RoundToNearest(bits=[3, 4, 8], group=32)
        plan, builder = plan_store(anatomy, compressor), StoreBuilder(layer_errors=False)
        store = builder.open(plan, texts["calibration"], model_name=family)
        evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
        problem = Budget(as_uniform=8).problem(store.units, fixed_bits=store.fixed_bits)
        genome, exporter = np.arange(len(store.units)) % 3, MLX(check_tokens=16)
        exporter.check(compressor, Drop(), anatomy)
        loaded = LoadedModel(family, anatomy.model, NoTokenizer())
        exporter.export(genome, problem=problem, evaluator=evaluator, folder=tmp_path / family, loaded=loaded)
        scored[family] = evaluator, genome
    np.save(tmp_path / "tokens.npy", tokens)
    run_engine("mlx", "mlx_logits", tmp_path / "tokens.npy", *(tmp_path / family for family in FAMILIES))
    for family, (evaluator, genome) in scored.items():
        assert_scored(torch.from_numpy(np.load(tmp_path / f"{family}.npy")), tokens, evaluator, genome)


class TestAsymmetric(MLXContract):
    pass


class TestSymmetricAndTied(MLXContract):
    symmetric = True
    group = 64


def test_a_budget_counts_what_mlx_keeps_where_it_is_asked_to(tmp_path) -> None:
    anatomy, texts = Anatomy(small("llama", intermediate_size=64).half().float()), two_splits()
    store = StoreBuilder().open(
        plan_store(anatomy, RoundToNearest(bits=[3, 4], group=32, group_bits=48)),
        texts["calibration"],
        model_name="llama",
    )
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    problem = Budget(as_uniform=4).problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.arange(len(store.units)) % 2
    loaded = LoadedModel("llama", anatomy.model, NoTokenizer())
    MLX().export(genome, problem=problem, evaluator=evaluator, folder=tmp_path / "model", loaded=loaded)
    assert tensor_bytes(tmp_path / "model") == Winner(genome, problem, evaluator).packed_bytes
    assert "more than the budget counted" not in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    ("family", "drop", "kinds", "message"),
    [
        ("gemma3_text", Drop(granularity="blocks"), ["sliding_attention", "full_attention"], "drop=none"),
        ("gemma3_text", Drop(), ["full_attention", "sliding_attention"], "which ones see the whole text"),
        ("gpt_neox", Drop(), [], "mlx-lm does not load quantized gpt_neox"),
    ],
)
def test_models_that_mlx_lm_would_build_otherwise_are_told_before_any_work(
    family: str, drop, kinds: list[str], message: str
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = small(family, **sizes, **({"head_dim": 16, "layer_types": kinds} if kinds else {}))
    with pytest.raises(SettingError, match=message):
        MLX().check(GPTQ(group=32), drop, Anatomy(model))


def test_seven_bits_are_told_before_the_search_with_what_fits() -> None:
    anatomy = Anatomy(small("llama", intermediate_size=64))
    units = plan_store(anatomy, RoundToNearest(bits=[4, 6, 7], group=32)).units
    message = (
        r"this one holds 1, 2, 3, 4, 5, 6, 8 bits; the nearest that fits is 6bit, "
        r"got '7bit of model\.layers\.0\.self_attn\.q_proj'"
    )
    with pytest.raises(SettingError, match=message):
        MLX().check_problem(Budget(as_uniform=6).problem(units), anatomy)
