import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.floating import FloatingPoint
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.several import Several
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.compressed_layers import decompressed
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
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
        return CompressedTensors(check_tokens=16, engine="transformers")

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

    @pytest.mark.usefixtures("exported")
    def test_the_config_names_the_class(self, tmp_path) -> None:
        """Of a Gemma 3 whose config names none, vLLM makes an embedding model."""
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]

    def test_codes_are_packed_to_the_bit(self, exported, store, tmp_path) -> None:
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


class TestAsymmetric(ExporterContract):
    """Widths that do not divide a word, and zeros: what transformers does not load, and vLLM does."""

    def make(self) -> CompressedTensors:
        return CompressedTensors(check_tokens=16)

    def compressor(self) -> GPTQ:
        return GPTQ(bits=[3, 5, 7], group=16)

    def test_compressed_tensors_decompresses_what_was_scored(
        self, exported, evaluator, genome, store, tmp_path
    ) -> None:
        folder = tmp_path / "model"
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        tensors = load_file(folder / "model.safetensors")
        paths = [path for group in config["config_groups"].values() for path in group["targets"]]
        assert sorted(paths) == sorted(unit.name for unit in store.units) and config["ignore"] == ["lm_head"]
        for group in config["config_groups"].values():
            assert group["weights"]["symmetric"] is False
            for path in group["targets"]:
                index = paths_of(store).index(path)
                weight = decompressed(path, tensors, group)
                assert torch.equal(weight, evaluator.weight(index, int(genome[index])))

    @pytest.mark.usefixtures("exported")
    def test_codes_and_zeros_are_packed_to_the_bit(self, genome, store, tmp_path) -> None:
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        for index, unit in enumerate(store.units):
            rows, groups = tensors[f"{unit.name}.weight_scale"].shape
            width = int(unit.levels[int(genome[index])].nominal.number)
            packed = sum(tensors[f"{unit.name}.weight_{part}"].numel() for part in ("packed", "zero_point"))
            padding = groups * (-rows * width % 32)  # zeros are packed along the outputs
            assert 32 * packed + 16 * rows * groups - padding == unit.levels[int(genome[index])].cost
            assert padding == 0 or rows == 16


class TestFloats(ExporterContract):
    """FP8 and MXFP4 beside integers."""

    def make(self) -> CompressedTensors:
        return CompressedTensors(check_tokens=16)

    def compressor(self) -> Several:
        return Several(
            parts={
                "floating": FloatingPoint(formats=["mxfp4", "fp8"]),
                "gptq": GPTQ(bits=[3, 6], group=16, symmetric=True),
            },
            dominated=True,
        )

    @pytest.fixture
    def genome(self, problem):
        return np.arange(len(problem.units)) % 4

    def test_compressed_tensors_decompresses_what_was_scored(
        self, exported, evaluator, genome, store, tmp_path
    ) -> None:
        folder = tmp_path / "model"
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["format"] == "mixed-precision"
        formats = {group["format"] for group in config["config_groups"].values()}
        assert formats == {"pack-quantized", "mxfp4-pack-quantized", "float-quantized"}
        tensors = load_file(folder / "model.safetensors")
        for group in config["config_groups"].values():
            for path in group["targets"]:
                index = paths_of(store).index(path)
                weight = decompressed(path, tensors, group).float()
                assert torch.allclose(weight, evaluator.weight(index, int(genome[index])), rtol=1e-6)


def paths_of(store) -> list[str]:
    return [unit.name for unit in store.units]


def test_fused_layers_need_ties_before_the_search() -> None:
    anatomy = Anatomy(small("llama"))
    units = plan_store(anatomy, symmetric()).units
    budget = Budget(as_uniform=3)
    exporter = CompressedTensors()
    with pytest.raises(SettingError, match=r"got 'q_proj, k_proj, v_proj of block 0 .*units\.tie=fused"):
        exporter.check_problem(budget.problem(units), anatomy)
    exporter.check_problem(budget.problem(Units(tie="fused").tied(units, anatomy)), anatomy)
    CompressedTensors(engine="transformers").check_problem(budget.problem(units), anatomy)
    even = budget.problem(units).only(np.ones(len(units), dtype=np.int64))
    exporter.check_problem(even, anatomy)


@pytest.mark.parametrize(
    ("engine", "compressor", "drop", "family", "dtype", "message"),
    [
        (
            "transformers",
            GPTQ(group=16),
            Drop(),
            "llama",
            "float32",
            r"compressor\.symmetric=true, or export\.engine=vllm",
        ),
        ("vllm", SparseGPT(), Drop(), "llama", "float32", r"holds bit-widths and small floats: compressor=gptq"),
        ("vllm", GPTQ(symmetric=True), Drop(), "llama", "bfloat16", r"compressor\.coarse_scales=true"),
        ("vllm", GPTQ(symmetric=True), Drop(granularity="sublayers"), "llama", "float16", "drop=blocks"),
        ("vllm", GPTQ(symmetric=True), Drop(), "gpt2", "float32", "transposed layers"),
        (
            "vllm",
            GPTQ(bits=[3]),
            Drop(),
            "llama",
            "float32",
            r"k_proj has 16 outputs in a piece that vLLM moves, and zeros of 3 bits",
        ),
        ("vllm", FloatingPoint(formats=["nvfp4"]), Drop(), "llama", "float32", "share the one scale that nvfp4 has"),
        ("vllm", FloatingPoint(formats=["e2m3"]), Drop(), "llama", "float32", "holds no e2m3"),
        ("transformers", FloatingPoint(formats=["fp8"]), Drop(), "llama", "float32", "not seen to load fp8"),
    ],
)
def test_what_has_no_place_in_the_format_is_told_before_any_work(
    engine: str, compressor, drop, family: str, dtype: str, message: str
) -> None:
    anatomy = Anatomy(small(family, **FAMILIES[family]).to(getattr(torch, dtype)))
    with pytest.raises(SettingError, match=f"CompressedTensors must be one of .*{message}"):
        CompressedTensors(engine=engine).check(compressor, drop, anatomy)


@pytest.mark.parametrize("level", [0, 1])
def test_a_head_of_its_own_is_compressed_or_stays(level: int, tmp_path) -> None:
    model = small("llama")
    anatomy, texts = Anatomy(model), two_splits()
    head = Several(parts={"gptq": GPTQ(bits=[5], group=16, symmetric=True), "as_is": AsIs()}, dominated=True)
    units = Units(head=head)
    exporter = CompressedTensors()
    exporter.check(symmetric(), Drop(), anatomy, units)
    store = StoreBuilder().open(plan_store(anatomy, symmetric(), units=units), texts["calibration"], model_name="llama")
    genome = np.ones(len(store.units), dtype=np.int64)
    genome[-1] = level
    facts = exporter.export(
        genome,
        problem=Budget(bits_per_weight=16).problem(store.units),
        evaluator=Evaluator(anatomy=anatomy, store=store, splits=texts),
        folder=tmp_path / "model",
        loaded=LoadedModel("llama", model, NoTokenizer()),
    )
    assert facts["max_logit_difference"] < 1e-4
    names = load_file(tmp_path / "model" / "model.safetensors")
    ignored = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ("lm_head.weight_packed" in names, "lm_head.weight" in names, ignored) == (
        (True, False, []) if level == 0 else (False, True, ["lm_head"])
    )


def test_an_embedding_is_no_unit_of_the_format() -> None:
    anatomy = Anatomy(small("llama"))
    with pytest.raises(SettingError, match=r"leaves the embedding as it is: units\.embedding=null"):
        CompressedTensors().check(symmetric(), Drop(), anatomy, Units(embedding=AsIs()))


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
