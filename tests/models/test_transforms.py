"""Rotation: the same logits from a plain model of the same family, or a refusal that says why."""

import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError, ModelError, SettingError
from evosweep.core.events import Silent
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.exporters.packed import TENSORS, PackedSafetensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel, Random, weights_hash
from evosweep.models.transforms.orthogonal import KINDS, hadamard, hadamard_order, rotation
from evosweep.models.transforms.rotate import Rotate
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing.tiny import tiny_config
from evosweep.workbench import Workbench
from tests.models.test_anatomy import FAMILIES, small
from tests.models.test_dropping import NoTokenizer, splits

QUIET = Silent()
GPTJ = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
MORE = {
    "gemma": {"head_dim": 8},
    "olmo": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "phi": {},
    "gptj": GPTJ,
    "cohere": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}
REFUSED = {
    "gemma2": "post_attention_layernorm normalizes what a layer adds to the stream",
    "gemma3_text": "post_attention_layernorm normalizes what a layer adds to the stream",
    "olmo2": "post_attention_layernorm normalizes what a layer adds to the stream",
    "mixtral": "reads the output of model.layers.0.post_attention_layernorm is no linear layer",
    "bloom": "reads the output of transformer.word_embeddings_layernorm is no linear layer",
}
SETTINGS = {"gemma3_text": {"head_dim": 8}, "bloom": {"n_layer": 3, "n_head": 4}, "olmo2": {}, "mixtral": {}}


def shaken(family: str, **settings) -> torch.nn.Module:
    """Return a tiny model whose gains and biases are not those of an untrained one."""
    model = small(family, **settings)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.3)
    return model.requires_grad_(False)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [family for family in [*FAMILIES, *MORE] if family not in REFUSED])
def test_rotated_models_give_the_same_logits(family: str, kind: str) -> None:
    model = shaken(family, **{**FAMILIES, **MORE}[family])
    before, weights = logits_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    Rotate(kind=kind, seed=3).apply(LoadedModel(family, model, None), progress=Recorder(said))
    assert torch.allclose(logits_of(model), before, atol=1e-4 * float(before.abs().max()), rtol=0)
    assert not any("stay" in text for text in said)  # values were found as well
    matrices = [name for name, value in weights.items() if value.dim() == 2]
    assert all(not torch.allclose(model.state_dict()[name], weights[name], atol=1e-3) for name in matrices)


class Recorder(Silent):
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("family", REFUSED)
def test_norms_that_cannot_be_folded_are_refused(family: str) -> None:
    model = shaken(family, **{**FAMILIES, **SETTINGS}[family])
    with pytest.raises(ModelError, match=f"norms of .* cannot be folded.*{REFUSED[family]}.*residual=false"):
        Rotate().apply(LoadedModel(family, model, None), progress=QUIET)


def test_projections_around_the_blocks_are_refused() -> None:
    model = shaken("opt", ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64)
    with pytest.raises(ModelError, match=r"norms of OPTForCausalLM cannot be folded.*16 wide and its blocks 32"):
        Rotate().apply(LoadedModel("opt", model, None), progress=QUIET)


def test_norms_after_blocks_are_refused_by_their_logits() -> None:
    model = shaken("opt", **{**FAMILIES["opt"], "do_layer_norm_before": False})
    with pytest.raises(ModelError, match="norms of OPTForCausalLM cannot be folded: its logits differ"):
        Rotate().apply(LoadedModel("opt", model, None), progress=QUIET)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "gpt2"])
def test_values_alone_leave_the_stream_and_a_tied_head(family: str) -> None:
    model = shaken(family, **{**FAMILIES, **SETTINGS}[family])
    before, embedding = logits_of(model), model.get_input_embeddings().weight.clone()
    loaded = Rotate(residual=False).apply(LoadedModel(family, model, None), progress=QUIET)
    assert torch.allclose(logits_of(model), before, atol=1e-4 * float(before.abs().max()), rtol=0)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert loaded.size_note == ""


def test_a_rotated_layer_norm_has_nothing_to_subtract() -> None:
    model = shaken("gpt2", **FAMILIES["gpt2"])
    Rotate().apply(LoadedModel("gpt2", model, None), progress=QUIET)
    embedding = model.transformer.wte.weight + 0
    assert float(embedding.mean(-1).abs().max()) < 1e-6
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(32))
    assert torch.equal(model.transformer.h[0].ln_1.bias, torch.zeros(32))  # its readers have biases, the head has none
    assert float(model.transformer.ln_f.bias.abs().max()) > 0


def test_gains_are_folded_into_a_plain_llama() -> None:
    model = shaken("llama")
    gain, query = (model.model.layers[0].input_layernorm.weight + 0, model.model.layers[0].self_attn.q_proj.weight + 0)
    Rotate(kind="orthogonal", seed=5).apply(LoadedModel("llama", model, None), progress=QUIET)
    q = torch.from_numpy(rotation(32, kind="orthogonal", seed=5, purpose="residual"))
    expected = (query.double() * gain.double()) @ q
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight.double(), expected, atol=1e-6)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(32))


def test_half_precision_is_kept_and_close() -> None:
    model = shaken("llama").to(torch.bfloat16)
    before = logits_of(model).float()
    Rotate().apply(LoadedModel("llama", model, None), progress=QUIET)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert float((logits_of(model).float() - before).abs().max()) < 0.05 * float(before.abs().max())


def test_the_same_seed_gives_the_same_weights() -> None:
    hashes = []
    for seed in (0, 0, 1):
        loaded = Random(name="r", config=tiny_config, device="cpu").load(progress=QUIET)
        hashes.append(weights_hash(Rotate(seed=seed).apply(loaded, progress=QUIET).model))
    assert hashes[0] == hashes[1] != hashes[2]


def tied() -> LoadedModel:
    model = shaken("llama", tie_word_embeddings=True)
    return Rotate().apply(LoadedModel("tied", model, NoTokenizer()), progress=QUIET)


def test_exports_of_a_rotated_model_reload_with_a_head_of_their_own(tmp_path) -> None:
    loaded, texts = tied(), splits()
    anatomy = Anatomy(loaded.model)
    compressor = GPTQ(bits=[2, 4], group=16, symmetric=True)
    plan = plan_store(anatomy, compressor)
    assert plan.fixed_bits == 32 * (2 * 64 * 32 + 7 * 32)  # embedding, head, norms
    store = StoreBuilder().open(plan, texts["calibration"], model_name="tied")
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    problem = Budget(as_uniform=4).problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.arange(len(store.units)) % 2
    for exporter in (DenseSafetensors(), PackedSafetensors(), CompressedTensors()):
        folder = tmp_path / type(exporter).__name__
        facts = exporter.export(genome, problem=problem, evaluator=evaluator, folder=folder, loaded=loaded)
        assert facts["max_logit_difference"] < 1e-4
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.architectures in (["LlamaForCausalLM"], None) and not config.tie_word_embeddings
    file = tmp_path / "PackedSafetensors" / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == pytest.approx(1e6 * problem.megabytes(problem.cost(genome)), abs=1)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "DenseSafetensors")
    assert plain.lm_head.weight.data_ptr() != plain.model.embed_tokens.weight.data_ptr()


def test_a_budget_that_cannot_pay_for_the_head_says_so() -> None:
    bench = Workbench(loaded=tied(), splits=splits(), compressor=GPTQ(bits=[2, 4], group=16))
    with pytest.raises(BudgetError, match=r"budget.megabytes must be at least .*unties the head, which adds 0.008 MB"):
        bench.planned_problem(Budget(megabytes=0.01))


@pytest.mark.parametrize(("order", "known"), [(12, 12), (20, 20), (28, 28), (36, 36), (576, 576), (896, 896), (24, 24)])
def test_hadamard_matrices(order: int, known: int) -> None:
    assert hadamard_order(order) == known
    matrix = hadamard(order)
    assert set(np.unique(matrix)) == {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))
    assert np.array_equal(matrix[:, 0], np.ones(order))


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 6, 7, 32, 36, 72])
def test_rotations_are_orthogonal(size: int, kind: str, keeps_mean: bool) -> None:
    q = rotation(size, kind=kind, seed=0, purpose="test", keeps_mean=keeps_mean)
    assert np.allclose(q @ q.T, np.eye(size), atol=1e-12)
    if keeps_mean:
        assert np.allclose(np.ones(size) @ q, 1.0) and np.allclose(q @ np.ones(size), 1.0)
    if kind == "hadamard" and not keeps_mean and hadamard_order(size) == size:
        assert np.allclose(np.abs(q), size**-0.5)
    if size > 1:
        assert not np.allclose(q, rotation(size, kind=kind, seed=1, purpose="test", keeps_mean=keeps_mean))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hadamar"}, "kind must be one of .*did you mean 'hadamard'"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"residual": False, "values": False}, "residual must be true where values=false"),
        ({"values": 1}, "values must be true or false"),
    ],
)
def test_settings_are_checked(settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Rotate(**settings)
