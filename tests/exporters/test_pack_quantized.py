import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing import ExporterContract
from tests.models.test_anatomy import FAMILIES, small
from tests.models.test_dropping import NoTokenizer
from tests.models.test_dropping import splits as two_splits


def symmetric() -> GPTQ:
    return GPTQ(bits=[2, 3, 4, 8], group=16, symmetric=True)


@pytest.fixture(scope="module")
def store(anatomy, splits):
    return StoreBuilder().open(plan_store(anatomy, symmetric()), splits["calibration"], model_name="tiny")


@pytest.fixture(scope="module")
def evaluator(anatomy, splits, store):
    return Evaluator(anatomy=anatomy, store=store, splits=splits)


class TestCompressedTensors(ExporterContract):
    def make(self) -> CompressedTensors:
        return CompressedTensors(check_tokens=16)

    def compressor(self) -> GPTQ:
        return symmetric()

    def test_transformers_loads_what_was_scored(self, exported, evaluator, splits, tmp_path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert model.config.quantization_config.quant_method == "compressed-tensors"
        tokens = torch.from_numpy(splits["search"].windows[:1])
        genome = np.arange(len(evaluator.store.units)) % 2
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0]
        assert torch.allclose(logits, evaluator.logits(genome, tokens), atol=1e-4)

    def test_codes_are_packed_to_the_bit(self, exported, store, tmp_path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(tmp_path / "model" / "model.safetensors")
        for place, unit in enumerate(store.units):
            bits = sum(
                8 * tensors[f"{unit.name}.{part}"].numel() * size
                for part, size in (
                    ("weight_packed", 4),
                    ("weight_scale", 2),
                )  # the store's scales are fp16, this model's are fp32
            )
            assert bits == unit.levels[place % 2].cost


@pytest.mark.parametrize("family", ["mistral", "qwen3", "opt"])
def test_other_decoders_with_a_block_dropped(family: str, tmp_path) -> None:
    anatomy, texts = Anatomy(small(family, **FAMILIES[family])), two_splits()
    compressor, drop = GPTQ(bits=[3, 8], group=16, symmetric=True), Drop(granularity="blocks", keep=[0])
    store = StoreBuilder().open(plan_store(anatomy, compressor, drop), texts["calibration"], model_name=family)
    problem = Budget(bits_per_weight=9).problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.arange(len(problem.units)) % 2
    genome[next(iter(store.drops))] = 0
    facts = CompressedTensors().export(
        genome,
        problem=problem,
        evaluator=Evaluator(anatomy=anatomy, store=store, splits=texts),
        folder=tmp_path / "model",
        loaded=LoadedModel(family, anatomy.model, NoTokenizer()),
    )
    assert facts["max_logit_difference"] < 1e-4


@pytest.mark.parametrize(
    ("compressor", "drop", "family", "dtype", "message"),
    [
        (GPTQ(), Drop(), "llama", "float32", r"CompressedTensors must be one of .*compressor\.symmetric=true"),
        (SparseGPT(), Drop(), "llama", "float32", r"CompressedTensors must be one of .*compressor\.symmetric=true"),
        (GPTQ(symmetric=True), Drop(), "llama", "bfloat16", r"compressor\.coarse_scales=true"),
        (GPTQ(symmetric=True), Drop(granularity="sublayers"), "llama", "float16", "drop=blocks"),
        (GPTQ(symmetric=True), Drop(), "gpt2", "float32", "transposed layers"),
    ],
)
def test_what_has_no_place_in_the_format_is_told_before_any_work(
    compressor, drop, family: str, dtype: str, message: str
) -> None:
    anatomy = Anatomy(small(family, **FAMILIES[family]).to(getattr(torch, dtype)))
    with pytest.raises(SettingError, match=message):
        CompressedTensors().check(compressor, drop, anatomy)


def test_a_bfloat16_model_loads_as_it_was_scored(tmp_path) -> None:
    model = small("llama").to(torch.bfloat16)
    anatomy, texts = Anatomy(model), two_splits()
    compressor = GPTQ(bits=[3, 4], group=16, symmetric=True, coarse_scales=True)
    store = StoreBuilder().open(plan_store(anatomy, compressor), texts["calibration"], model_name="llama")
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    genome = np.arange(len(store.units)) % 2
    CompressedTensors().export(
        genome,
        problem=Budget(as_uniform=4).problem(store.units),
        evaluator=evaluator,
        folder=tmp_path / "model",
        loaded=LoadedModel("llama", model, NoTokenizer()),
    )
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    reloaded(input_ids=torch.zeros((1, 4), dtype=torch.long))  # only now are weights unpacked
    weights = dict(reloaded.named_parameters())
    for place, unit in enumerate(store.units):
        assert torch.equal(weights[f"{unit.name}.weight"], evaluator.weight(place, int(genome[place])))
