"""Mixtures of experts of many families: a level for each expert, scored, exported, reloaded."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import TENSORS, PackedSafetensors
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.expert_slots import ExpertSlot
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.mixtures.models import MIXTURES, mixture, token_splits
from tests.models.test_dropping import NoTokenizer

COMPRESSORS = {"gptq": GPTQ(bits=[2, 4], group=16), "sparse": SparseGPT(mask_block=16)}


def swapped_kl(evaluator: Evaluator, genome: np.ndarray, windows: np.ndarray) -> float:
    """Return the KL of a genome from whole forward passes of the model, its weights overwritten by the genome's."""
    anatomy = evaluator.anatomy
    tokens = torch.from_numpy(windows)
    indices = {unit.name: index for index, unit in enumerate(evaluator.store.units)}
    slots = [slot for slot in anatomy.slots if slot.name in indices]
    weights = {slot.name: evaluator.weight(indices[slot.name], int(genome[indices[slot.name]])) for slot in slots}
    with torch.no_grad():
        dense = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        with replaced_weights(slots, weights):
            changed = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return float((dense.exp() * (dense - changed)).sum(-1).mean())


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_scored_is_what_the_model_computes(family: str, compressor: str, tmp_path: Path) -> None:
    anatomy, texts = Anatomy(mixture(family)), token_splits()
    plan = plan_store(anatomy, COMPRESSORS[compressor])
    store = StoreBuilder().open(plan, texts["calibration"], model_name=family)
    tied = Units().tied(store.units, anatomy, common=True)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts, units=tied)
    rng = np.random.default_rng(0)
    sizes = np.array([len(unit.levels) for unit in store.units])
    each = rng.integers(0, sizes, (4, len(sizes)))
    block = evaluator.expand(rng.integers(0, [len(unit.levels) for unit in tied], (2, len(tied))))
    genomes = np.concatenate([each, block])
    found = evaluator.score(genomes, split="search", windows=[0, 3], fitness=[KL()])["kl"]
    expected = [swapped_kl(evaluator, genome, texts["search"].windows[[0, 3]]) for genome in genomes]
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 1e-3

    problem = Budget(bits_per_weight=14).problem(store.units, fixed_bits=store.fixed_bits)
    for exporter in (DenseSafetensors(), PackedSafetensors()):
        facts = exporter.export(
            each[0],
            problem=problem,
            evaluator=evaluator,
            folder=tmp_path / type(exporter).__name__,
            loaded=LoadedModel(family, anatomy.model, NoTokenizer()),
        )
        assert facts["max_logit_difference"] < 1e-4
    file = tmp_path / "PackedSafetensors" / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    counted = 1e6 * problem.megabytes(problem.cost(each[0]))
    assert file.stat().st_size - header == pytest.approx(counted, abs=2)


@pytest.mark.parametrize("family", MIXTURES)
def test_all_matrices_of_all_experts_are_slots_and_no_router_is(family: str) -> None:
    anatomy = Anatomy(mixture(family))
    experts = [slot for slot in anatomy.slots if isinstance(slot, ExpertSlot)]
    fused = {id(parameter): parameter for parameter in anatomy.blocks.parameters() if parameter.ndim == 3}
    fused = {key: value for key, value in fused.items() if value.shape[0] == 4}
    assert sum(slot.read().numel() for slot in experts) == sum(parameter.numel() for parameter in fused.values())
    assert {id(slot.parameter) for slot in experts} == set(fused)
    assert {slot.share for slot in experts} == {0.5}
    units = Units().layers(anatomy)
    assert {slot.name for slot in experts} <= {slot.name for slot in units}
    others = [slot.name for slot in units if not isinstance(slot, ExpertSlot)]
    assert not [name for name in others if name.endswith(("gate", "router", "router.layer"))]
    routers = [name for name, _ in anatomy.model.named_parameters() if "router" in name or ".gate." in name]
    assert routers
