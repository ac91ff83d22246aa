"""Populations of models whose blocks are given or hand on more than hidden states, against swapped weights."""

import math
import tempfile

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.events import Silent
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.patch import replaced_weights
from evosweep.store.build import StoreBuilder
from evosweep.store.statistics.output_gradient_square import measure_model
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.evaluate.test_population import genomes_of
from tests.models.beside import CHAIN, WHOLE, V, made
from tests.models.test_anatomy import small

COMPRESSORS = {"gptq": GPTQ(bits=[2, 4], group=4), "sparse": SparseGPT(mask_block=16)}


def splits() -> dict[str, TokenSplit]:
    rng = np.random.default_rng(0)
    names = ("calibration", "search", "validation")
    return {name: TokenSplit(name, rng.integers(0, V, (6, 16)), ("x",)) for name in names}


def evaluator_of(anatomy: Anatomy, compressor, drop: Drop | None = None) -> Evaluator:
    texts = splits()
    plan = plan_store(anatomy, compressor, drop, Units(coverage=0))
    store = StoreBuilder().open(plan, texts["calibration"], model_name="any")
    return Evaluator(anatomy=anatomy, store=store, splits=texts)


@torch.no_grad()
def one_by_one(anatomy: Anatomy, store, genome, windows) -> tuple[float, float]:
    """Return KL and perplexity of swapped weights, each window alone through the model's own forward."""
    weights = {u.name: store.weight(u.name, u.levels[g].name) for u, g in zip(store.units, genome, strict=True)}

    def logits() -> torch.Tensor:
        found = [anatomy.model(input_ids=torch.from_numpy(window)[None], use_cache=False).logits for window in windows]
        return torch.cat(found)[:, :-1].double().log_softmax(-1)

    dense = logits()
    with replaced_weights([slot for slot in anatomy.all_slots if slot.name in weights], weights):
        ours = logits()
    nll = -ours.gather(-1, torch.from_numpy(windows)[:, 1:, None]).mean()
    return float((dense.exp() * (dense - ours)).sum(-1).mean()), math.exp(float(nll))


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("family", [*CHAIN, *WHOLE])
def test_scores_are_those_of_swapped_weights(family: str, compressor: str) -> None:
    anatomy = Anatomy(made((CHAIN | WHOLE)[family]()))
    assert bool(anatomy.whole_because) == (family in WHOLE)
    evaluator = evaluator_of(anatomy, COMPRESSORS[compressor])
    genomes = genomes_of(evaluator.store, 4)
    genomes[2] = genomes[1]  # twins share every row
    genomes[3, : len(genomes[3]) // 2] = genomes[0, : len(genomes[0]) // 2]  # and these share the first blocks
    scores = evaluator.score(genomes, split="search", windows=[0, 2, 5], fitness=[KL(), Perplexity()])
    for row in (0, 1, 3):
        kl, ppl = one_by_one(anatomy, evaluator.store, genomes[row], evaluator.splits["search"].windows[[0, 2, 5]])
        assert scores["kl"][row] == pytest.approx(kl, rel=1e-5, abs=1e-6)
        assert scores["ppl"][row] == pytest.approx(ppl, rel=1e-5)
    assert scores["kl"][2] == scores["kl"][1]


SIXTEEN = GPTQ(bits=[2, 4], group=16)


def with_own_store(anatomy: Anatomy, drop: Drop | None = None) -> Evaluator:
    """Return an evaluator whose store is built, not found where the same model was calibrated block by block."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("EVOSWEEP_CACHE", folder)
        evaluator = evaluator_of(anatomy, SIXTEEN, drop)
        for index, unit in enumerate(evaluator.store.units):
            for level in range(len(unit.levels)):
                if not unit.gates:
                    evaluator.weight(index, level)  # kept in memory
        return evaluator


@pytest.fixture(scope="module")
def both_ways() -> tuple[Evaluator, Evaluator]:
    """One model block by block, and as a whole though it need not."""
    apart = Anatomy(small("llama"))
    whole = Anatomy(small("llama"))
    whole.whole_because = "asked for"
    return evaluator_of(apart, SIXTEEN), with_own_store(whole)


def test_calibration_through_the_whole_model_approximates_nothing(both_ways) -> None:
    apart, whole = both_ways
    for index, (unit, other) in enumerate(zip(apart.store.units, whole.store.units, strict=True)):
        assert unit.columns == pytest.approx(other.columns, rel=1e-5)
        for level in range(len(unit.levels)):
            assert torch.allclose(apart.weight(index, level), whole.weight(index, level))


def test_gradients_through_the_whole_model_are_those_block_by_block(both_ways) -> None:
    tokens = torch.from_numpy(both_ways[0].splits["calibration"].windows)
    apart, whole = (measure_model(one.anatomy, tokens, batch_tokens=10**6, progress=Silent()) for one in both_ways)
    for name, values in apart.items():
        assert torch.allclose(whole[name], values, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("granularity", ["sublayers", "blocks"])
def test_rows_without_parts_of_the_whole_model(granularity: str) -> None:
    apart = Anatomy(small("llama"))
    whole = Anatomy(small("llama"))
    whole.whole_because = "asked for"
    first = evaluator_of(apart, SIXTEEN, Drop(granularity=granularity))
    other = with_own_store(whole, Drop(granularity=granularity))
    genomes = genomes_of(first.store, 6)
    found = [one.score(genomes, split="search", windows=[0, 3], fitness=[KL()])["kl"] for one in (first, other)]
    assert np.allclose(*found, rtol=1e-5)
    for unit, same in zip(first.store.units, other.store.units, strict=True):
        assert unit.columns == pytest.approx(same.columns, rel=1e-5)
