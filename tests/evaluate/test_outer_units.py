import numpy as np
import pytest
import torch

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.several import Several
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.fitness.topk_kl import TopKKL
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.models.test_anatomy import small
from tests.models.test_dropping import NoTokenizer


def levels_of(compressor) -> Several:
    return Several(parts={"codes": compressor, "as_is": AsIs()}, dominated=True)


def units() -> Units:
    embedding = levels_of(RoundToNearest(bits=[4, 8], group=16))
    return Units(embedding=embedding, head=levels_of(GPTQ(bits=[4, 8], group=16)))


@pytest.fixture(scope="module", params=["tied", "untied"])
def case(request):
    anatomy = Anatomy(small("llama", tie_word_embeddings=request.param == "tied"))
    rng = np.random.default_rng(0)
    names = ("calibration", "search", "validation")
    splits = {name: TokenSplit(name, rng.integers(0, 64, (6, 16)), ("x",)) for name in names}
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16), None, units())
    store = StoreBuilder().open(plan, splits["calibration"], model_name="outer")
    return request.param, anatomy, plan, store, Evaluator(anatomy=anatomy, store=store, splits=splits)


def some(store, count: int = 8) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([rng.integers(0, [len(unit.levels) for unit in store.units]) for _ in range(count)])


def test_candidates_at_different_levels_score_as_each_alone(case) -> None:
    _, anatomy, _, store, evaluator = case
    genomes = some(store)
    tokens = torch.from_numpy(evaluator.splits["search"].windows[[0, 3]])
    found = evaluator.score(genomes, split="search", windows=[0, 3], fitness=[KL(), Perplexity(), TopKKL(k=63)])
    slots = [anatomy.slot(unit.name) for unit in store.units]
    with torch.no_grad():
        dense = anatomy.model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        for row, genome in enumerate(genomes):
            weights = {u.name: store.weight(u.name, u.levels[g].name) for u, g in zip(store.units, genome, strict=True)}
            with replaced_weights(slots, weights):
                ours = anatomy.model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
            kl = float((dense.exp() * (dense - ours)).sum(-1).mean())
            nll = -ours.gather(-1, tokens[:, 1:, None]).mean()
            assert found["kl"][row] == pytest.approx(kl, rel=1e-3, abs=2e-6)
            assert found["ppl"][row] == pytest.approx(float(nll.exp()), rel=1e-5)
            assert found["top63_kl"][row] == pytest.approx(kl, rel=1e-2, abs=1e-5)


def test_their_bits_are_counted_once_and_left_out_of_what_is_fixed(case) -> None:
    kind, anatomy, plan, store, _ = case
    outer = [unit for unit in store.units if unit.outer]
    assert [unit.name for unit in outer] == ["model.embed_tokens", "lm_head"][: 1 if kind == "tied" else 2]
    assert store.units[0].outer and (kind == "tied" or store.units[-1].outer)
    for unit in outer:
        for level in unit.levels:
            tensors = store.payload(unit.name, level.name).tensors().values()
            assert level.cost == sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
            assert level.error is not None
    units_of = {id(slot.parameter) for slot in anatomy.all_slots}
    rest = sum(32 * p.numel() for p in anatomy.model.parameters() if id(p) not in units_of)
    assert plan.fixed_bits == store.fixed_bits == rest


def test_a_uniform_budget_takes_their_nearest_level(case) -> None:
    *_, store, _ = case
    problem = Budget(as_uniform=3).problem(store.units)
    uniform = problem.decode(problem.uniform())
    assert problem.cost(problem.uniform()) == problem.budget
    assert {uniform[unit.name] for unit in store.units if unit.outer} == {"4bit"}
    assert {uniform[unit.name] for unit in store.units if not unit.outer} == {"3bit"}
    assert Budget(as_uniform="3bit").problem(store.units).budget == problem.budget


@pytest.mark.parametrize("exporter", [DenseSafetensors(check_tokens=8), PackedSafetensors(check_tokens=8)])
def test_exports_say_what_was_scored(case, exporter, tmp_path) -> None:
    *_, store, evaluator = case
    problem = Budget(bits_per_weight=99).problem(store.units, fixed_bits=store.fixed_bits)
    loaded = LoadedModel(model=evaluator.anatomy.model, tokenizer=NoTokenizer(), name="outer")
    report = exporter.export(
        some(store)[2], problem=problem, evaluator=evaluator, loaded=loaded, folder=tmp_path / "model"
    )
    assert report["max_logit_difference"] < 1e-4


def test_a_looked_up_embedding_cannot_be_compensated() -> None:
    anatomy = Anatomy(small("llama", tie_word_embeddings=False))
    with pytest.raises(SettingError, match="embedding"):
        plan_store(anatomy, GPTQ(bits=[2], group=16), None, Units(embedding=GPTQ(bits=[4], group=16)))
