import math

import numpy as np
import pytest
import torch

from evosweep.allocators.alpha_pruning import HILL
from evosweep.allocators.harm import AROUND_TOP, AROUND_UNIFORM, KL_PER_ERROR
from evosweep.compressors.gptq import GPTQ
from evosweep.core.errors import EvosweepError, ModelError, SettingError
from evosweep.core.events import Silent
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate import memory
from evosweep.evaluate.memory import MemoryPlan, Resources, chunks
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.routing import distinct_rows, levels_in
from evosweep.evaluate.scorer import StagedScorer
from evosweep.evaluate.sensitivity import measure
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.anatomy import Anatomy
from evosweep.models.patch import replaced_weights
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.models.test_anatomy import FAMILIES, small


def plainly(anatomy: Anatomy, store, genome, windows) -> tuple[float, float]:
    """Return KL and perplexity by swapping weights in and comparing all logits."""
    tokens = torch.from_numpy(windows)
    weights = {u.name: store.weight(u.name, u.levels[g].name) for u, g in zip(store.units, genome, strict=True)}
    with torch.no_grad():
        dense = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        with replaced_weights(anatomy.slots, weights):
            ours = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    nll = -ours.gather(-1, tokens[:, 1:, None]).mean()
    return float((dense.exp() * (dense - ours)).sum(-1).mean()), math.exp(float(nll))


def genomes_of(store, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, [len(unit.levels) for unit in store.units]) for _ in range(count)])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    anatomy = Anatomy(small(request.param, **FAMILIES[request.param]))
    rng = np.random.default_rng(0)
    splits = {
        name: TokenSplit(name, rng.integers(0, 64, (6, 16)), ("x",)) for name in ("calibration", "search", "validation")
    }
    store = StoreBuilder().open(
        plan_store(anatomy, GPTQ(bits=[2, 4], group=16)), splits["calibration"], model_name="family"
    )
    return anatomy, store, Evaluator(anatomy=anatomy, store=store, splits=splits)


def test_a_population_scores_as_each_alone_by_module_swaps(family) -> None:
    anatomy, store, evaluator = family
    genomes = genomes_of(store, 5)
    genomes[3] = genomes[1]  # twins share every row
    genomes[4, : len(genomes[4]) // 2] = genomes[0, : len(genomes[0]) // 2]  # and these share the first blocks
    scores = evaluator.score(genomes, split="search", windows=[0, 2, 5], fitness=[KL(), Perplexity()])
    for row, genome in enumerate(genomes):
        kl, ppl = plainly(anatomy, store, genome, evaluator.splits["search"].windows[[0, 2, 5]])
        assert scores["kl"][row] == pytest.approx(kl, rel=1e-3, abs=2e-6)
        assert scores["ppl"][row] == pytest.approx(ppl, rel=1e-5)


def test_the_dense_model_is_at_no_distance_from_itself(family) -> None:
    anatomy, _, evaluator = family
    scores = evaluator.score(None, split="search", windows=[0, 1], fitness=[KL(), Perplexity()])
    assert scores["kl"][0] == pytest.approx(0, abs=1e-5)
    tokens = torch.from_numpy(evaluator.splits["search"].windows[:2])
    with torch.no_grad():
        loss = anatomy.model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert scores["ppl"][0] == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_the_dense_figures_of_a_bfloat16_model_are_measured_and_zero() -> None:
    """In bfloat16 too, where logits of 20 were once rounded to 0.06 before the two models were compared."""
    model = small("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(60)
    anatomy = Anatomy(model.to(torch.bfloat16))
    rng = np.random.default_rng(0)
    names = ("calibration", "search", "validation")
    splits = {name: TokenSplit(name, rng.integers(0, 64, (6, 16)), ("x",)) for name in names}
    store = StoreBuilder().open(
        plan_store(anatomy, GPTQ(bits=[2, 4], group=16)), splits["calibration"], model_name="family"
    )
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    figures = StagedScorer(evaluator, fitness=KL(), seed=0).validate(None)
    assert abs(figures["kl"]) < 1e-5 and figures["ppl"] > 10
    found = evaluator.token_losses(None, split="validation", windows=range(6), fitness=[KL()])["kl"]
    assert np.abs(found).max() < 5e-5


def test_a_dense_model_that_gives_nan_on_the_text_is_refused(anatomy, store, splits) -> None:
    token = int(splits["validation"].windows[0][3])
    row = anatomy.model.get_input_embeddings().weight
    kept = row[token].clone()
    try:
        row[token] = float("nan")
        with pytest.raises(ModelError, match=r"the dense model's loss .* in float32: choose another model\.dtype"):
            StagedScorer(Evaluator(anatomy=anatomy, store=store, splits=splits), fitness=KL(), seed=0).validate(None)
    finally:
        row[token] = kept


def test_splitting_for_memory_changes_nothing(anatomy, store, splits, evaluator) -> None:
    genomes = genomes_of(store, 7)
    whole = evaluator.score(genomes, split="search", windows=[0, 1, 2, 3], fitness=[KL()])["kl"]
    starved = Evaluator(
        anatomy=anatomy,
        store=store,
        splits=splits,
        resources=Resources(memory_gb=4e-4),
    )
    assert len(chunks(7, (4, 32), tokens_at_once=starved._tokens_at_once)) > 4
    parts = starved.score(genomes, split="search", windows=[0, 1, 2, 3], fitness=[KL()])["kl"]
    assert parts == pytest.approx(whole, rel=1e-5)


def test_out_of_memory_halves_the_parts_and_goes_on(anatomy, store, splits, evaluator, monkeypatch, caplog) -> None:
    genomes = genomes_of(store, 7)
    whole = evaluator.score(genomes, split="search", windows=[0, 1, 2, 3], fitness=[KL()])["kl"]
    tight = Evaluator(anatomy=anatomy, store=store, splits=splits)
    plain = tight._losses

    def losses(rows, windows, *more):
        if len(rows) * len(windows) > 3:
            raise torch.OutOfMemoryError("full")
        return plain(rows, windows, *more)

    monkeypatch.setattr(tight, "_losses", losses)
    parts = tight.score(genomes, split="search", windows=[0, 1, 2, 3], fitness=[KL()])["kl"]
    assert parts == pytest.approx(whole, rel=1e-5) and "out of memory" in caplog.text
    monkeypatch.setattr(tight, "_losses", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(EvosweepError, match="one candidate on one window of 32 tokens"):
        tight.score(genomes, split="search", windows=[0], fitness=[KL()])


@pytest.mark.parametrize(
    ("memory_gb", "where", "device"),
    [(10, "nowhere", "cuda"), (3, "device", "cuda"), (1, "host", "cuda"), (1, "disk", "cpu")],
)
def test_levels_wait_where_they_fit(memory_gb: float, where: str, device: str, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**10)
    plan = MemoryPlan.of(
        Resources(memory_gb=memory_gb), torch.device(device), dense=5 * 10**9, packed=15 * 10**8, candidate=10**6
    )
    assert plan.packed == where
    on_device = plan.dense + plan.activations + plan.targets + (15 * 10**8 if where == "device" else 0)
    assert on_device <= memory_gb * 1e9


def test_memory_too_small_for_one_candidate_says_how_much_is_needed() -> None:
    with pytest.raises(SettingError, match=r"memory_gb must be at least 0.333, .* got 0.1"):
        MemoryPlan.of(Resources(memory_gb=0.1), torch.device("cpu"), dense=10**9, packed=10**9, candidate=10**8)


def test_a_prefix_is_what_the_whole_window_says_of_its_first_tokens(store, evaluator) -> None:
    genomes = genomes_of(store, 3)
    whole = evaluator.token_losses(genomes, split="search", windows=[0, 3], fitness=[KL()])["kl"]
    first = evaluator.token_losses(genomes, split="search", windows=[0, 3], fitness=[KL()], length=9)["kl"]
    assert whole.shape == (3, 2, 31) and first.shape == (3, 2, 8)
    np.testing.assert_allclose(first, whole[..., :8], rtol=1e-3, atol=1e-5)


def test_more_bits_are_nearer_to_the_dense_model(store, evaluator) -> None:
    ladder = np.stack([np.full(len(store.units), level) for level in range(3)])
    kl = evaluator.score(ladder, split="validation", windows=range(8), fitness=[KL()])["kl"]
    assert kl[0] > kl[1] > kl[2] > 0


def test_the_model_is_left_as_it_was(anatomy, store, evaluator) -> None:
    before = {name: tensor.clone() for name, tensor in anatomy.model.state_dict().items()}
    evaluator.score(genomes_of(store, 3), split="search", windows=[0], fitness=[KL()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in anatomy.model.state_dict().items())
    assert not any("forward" in vars(module) for module in anatomy.model.modules())


def test_stage_tokens_follow_from_their_place(store, evaluator) -> None:
    genomes = genomes_of(store, 2)

    def scores(seed: int, generation: int, stage: int) -> list[float]:
        scorer = StagedScorer(evaluator, fitness=KL(), seed=seed)
        return scorer.score(genomes, generation=generation, stage=stage, tokens=64).tolist()

    assert scores(0, 1, 0) == scores(0, 1, 0)
    assert len({tuple(scores(*place)) for place in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))}) == 4


def test_sensitivities_are_measured_once_and_positive(
    store, evaluator, make_store_problem, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    scales, spent = measure(KL_PER_ERROR, evaluator, problem, tokens=64, seed=0, progress=Silent())
    assert set(scales) == {unit.name for unit in problem.units} and spent == 64 * (len(scales) + 1)
    assert all(columns[KL_PER_ERROR] > 0 for columns in scales.values())
    monkeypatch.setattr(evaluator, "score", None)
    assert measure(KL_PER_ERROR, evaluator, problem, tokens=64, seed=0, progress=Silent()) == (scales, spent)


@pytest.mark.parametrize(("column", "base"), [(AROUND_UNIFORM, "3bit"), (AROUND_TOP, "4bit")])
def test_every_level_is_measured_alone(
    store, evaluator, make_store_problem, tmp_path, monkeypatch, column: str, base: str
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    rises, spent = measure(column, evaluator, problem, tokens=128, seed=0, progress=Silent())
    assert spent == 64 * (2 * len(problem.units) + 1)  # half of the tokens for each of the two other levels
    assert all(columns[f"{column}/{base}"] == 0 for columns in rises.values())
    assert np.mean([columns[f"{column}/2bit"] for columns in rises.values()]) > 0


def test_spectra_are_read_without_a_token(evaluator, store, make_store_problem, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    exponents, spent = measure(HILL, evaluator, make_store_problem(store), tokens=64, seed=0, progress=Silent())
    assert spent == 0 and len(exponents) == len(store.units)
    assert all(1 < columns[HILL] < 20 for columns in exponents.values())


def test_rows_are_grouped_as_numpy_would() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys = rng.integers(3, size=(17, 2))
        first, like = distinct_rows(keys)
        assert (keys[first][like] == keys).all() and len(first) == len(np.unique(keys, axis=0))
        levels, counts = levels_in(keys[:, 0])
        expected = np.unique(keys[:, 0], return_counts=True)
        assert levels == expected[0].tolist() and counts == expected[1].tolist()
