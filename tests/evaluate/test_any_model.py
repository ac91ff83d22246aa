"""Populations of models whose blocks are given or hand on more than hidden states, against swapped weights."""

import math

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.patch import replaced_weights
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.evaluate.test_population import genomes_of
from tests.models.beside import CHAIN, WHOLE, V, made

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
