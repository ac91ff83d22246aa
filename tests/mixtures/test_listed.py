"""Mixtures whose experts are a list of modules are known as those that are one tensor are."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.expert_slots import ListedSlot
from evosweep.models.patch import replaced_weights
from evosweep.models.sublayers import silenced
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.routed import met, routing_notes
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.mixtures.listed import Named, Routing, Sending, listed
from tests.mixtures.models import token_splits
from tests.mixtures.test_families import swapped_kl
from tests.mixtures.test_units import Said

MATRICES = ("w1", "w2", "w3")


def store_of(anatomy: Anatomy, units: Units | None = None, said: Said | None = None) -> LevelStore:
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16), units=units)
    return StoreBuilder().open(plan, token_splits()["calibration"], model_name="listed", progress=said)


def test_every_matrix_of_every_expert_is_a_unit_and_no_router_is() -> None:
    anatomy = Anatomy(listed())
    assert not anatomy.not_by_row and not anatomy.whole_because
    slots = [slot for slot in anatomy.slots if isinstance(slot, ListedSlot)]
    expected = [
        f"model.layers.{block}.mlp.experts.{expert}.{matrix}"
        for block in range(2)
        for matrix in ("w1", "w3", "w2")  # as they run
        for expert in range(4)
    ]
    assert [slot.name for slot in slots] == expected
    assert {slot.share for slot in slots} == {0.5}
    assert {slot.group.rpartition(".")[2] for slot in slots if slot.attribute == "w3"} == {"w1"}  # one moment for both
    units = [slot.name for slot in Units().layers(anatomy)]
    assert set(expected) < set(units) and not [name for name in units if name.endswith("gate")]
    assert plan_store(anatomy, GPTQ(bits=[2, 4], group=16)).coverage.share > 0.98

    plan = plan_store(anatomy, GPTQ(bits=[2, 3], group=16))
    tied = Units().tied(plan.units, anatomy, common=True)
    names = [unit.name for unit in tied if ".experts." in unit.name]
    assert names == [
        f"model.layers.{block}.mlp.experts.*.{matrix}" for block in (0, 1) for matrix in ("w1", "w3", "w2")
    ]
    each = Units(experts="each").tied(plan.units, anatomy, common=True)
    assert len(each) == len(plan.units) == len(tied) + 2 * 3 * 3  # three experts more in six places


@pytest.mark.parametrize("kind", [Routing, Sending, Named])
@pytest.mark.parametrize("compressor", [GPTQ(bits=[2, 4], group=16), SparseGPT(mask_block=16)])
def test_what_is_scored_is_what_the_model_computes(compressor: GPTQ | SparseGPT, kind: type[Routing]) -> None:
    anatomy = Anatomy(listed(kind=kind))
    assert not anatomy.not_by_row and len([slot for slot in anatomy.slots if isinstance(slot, ListedSlot)]) == 24
    texts = token_splits()
    units = Units(include=["*gate"], experts="each")
    store = StoreBuilder().open(plan_store(anatomy, compressor, units=units), texts["calibration"], model_name="listed")
    assert [unit.name for unit in store.units if unit.name.endswith("gate")]  # a router by rule
    tied = Units().tied(store.units, anatomy, common=True)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts, units=tied)
    rng = np.random.default_rng(0)
    each = rng.integers(0, [len(unit.levels) for unit in store.units], (5, len(store.units)))
    each[1] = each[0]
    each[1, 3] = (each[0, 3] + 1) % len(store.units[3].levels)
    block = evaluator.expand(rng.integers(0, [len(unit.levels) for unit in tied], (2, len(tied))))
    genomes = np.concatenate([each, block])
    found = evaluator.score(genomes, split="search", windows=[0, 3], fitness=[KL()])["kl"]
    expected = [swapped_kl(evaluator, genome, texts["search"].windows[[0, 3]]) for genome in genomes]
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 1e-3


def test_a_list_of_experts_can_be_dropped() -> None:
    anatomy = Anatomy(listed())
    texts = token_splits()
    plan = plan_store(anatomy, GPTQ(bits=[2, 4], group=16), Drop(granularity="sublayers"))
    store = StoreBuilder().open(plan, texts["calibration"], model_name="listed")
    index = {unit.name: index for index, unit in enumerate(store.units)}
    dropped = [index[name] for name in index if name.endswith("mlp") and store.units[index[name]].gates]
    assert len(dropped) == 2
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, 2, (4, len(store.units)))
    genomes[:, [unit for unit in range(len(store.units)) if store.units[unit].gates]] = 1
    genomes[1, dropped[0]] = 0
    genomes[2, dropped[1]] = 0
    windows = texts["search"].windows[[0]]
    found = evaluator.score(genomes, split="search", windows=[0], fitness=[KL()])["kl"]
    gone = {1: anatomy.model.model.layers[0].mlp, 2: anatomy.model.model.layers[1].mlp}
    for row, genome in enumerate(genomes):
        tokens = torch.from_numpy(windows)
        slots = [slot for slot in anatomy.slots if slot.name in index]
        weights = {slot.name: evaluator.weight(index[slot.name], int(genome[index[slot.name]])) for slot in slots}
        with torch.no_grad(), ExitStack() as stack:
            dense = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            stack.enter_context(replaced_weights(slots, weights))
            if row in gone:
                stack.enter_context(silenced(gone[row]))
            changed = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        assert found[row] == pytest.approx(float((dense.exp() * (dense - changed)).sum(-1).mean()), rel=1e-5)


def test_a_budget_counts_the_weights_that_are_active() -> None:
    anatomy = Anatomy(listed(experts=4, chosen=1))
    store = store_of(anatomy)
    tied = Units().tied(store.units, anatomy, common=True)
    whole = Budget(as_uniform=3).problem(tied, fixed_bits=store.fixed_bits)
    active = Budget(as_uniform=3, count="active").problem(tied, fixed_bits=store.fixed_bits)
    experts = sum(unit.levels[1].cost for unit in tied if ".experts." in unit.name)
    assert whole.budget - active.budget == experts * 3 // 4 > 0  # one of four experts
    shared = [unit for unit in store.units if ".shared_expert." in unit.name]
    assert len(shared) == 6 and all(unit.active.numel == unit.numel for unit in shared)


def test_an_expert_has_the_second_moment_of_its_routed_tokens_and_of_a_few_more() -> None:
    anatomy = Anatomy(listed())
    store = store_of(anatomy)
    texts = token_splits()
    tokens = torch.from_numpy(texts["calibration"].windows)
    given: list[torch.Tensor] = []
    routing = anatomy.model.model.layers[0].mlp
    handle = routing.register_forward_pre_hook(lambda _module, args: given.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        anatomy.run_block(0, anatomy.embed(tokens), tokens)
        handle.remove()
        index = routing.gate(given[0]).topk(2, dim=-1).indices
    counts = {unit.name: unit.columns["routed_tokens"] for unit in store.units if ".layers.0.mlp.experts." in unit.name}
    for expert in range(4):
        mine = int((index == expert).sum())
        assert {counts[f"model.layers.0.mlp.experts.{expert}.{matrix}"] for matrix in MATRICES} == {mine}
        name = f"model.layers.0.mlp.experts.{expert}.w1"
        inputs = torch.cat([given[0][(index == expert).any(-1)], given[0][::64]])  # 32 / share: every 64th of all
        unit = next(unit for unit in store.units if unit.name == name)
        for level in unit.levels:
            difference = anatomy.slot(name).read() - store.weight(name, level.name)
            errors = (inputs @ difference.T).square().sum(1) / inputs.square().sum(1)
            assert level.error == pytest.approx(mine / 128 * float(errors.detach().mean()), rel=1e-3)


def never(routing: Routing) -> None:
    """Let expert 1 be chosen by no token, and expert 2 by all of them."""
    routing.gate.bias = torch.nn.Parameter(torch.tensor([0.0, -20.0, 20.0, 0.0]))


def test_an_expert_that_no_token_goes_to_and_one_that_all_go_to() -> None:
    anatomy = Anatomy(listed(prepare=never))
    said = Said()
    store = store_of(anatomy, said=said)
    counts = {expert.name: expert.tokens for expert in met(store.manifest.units)}
    for block in range(2):
        found = [counts[f"model.layers.{block}.mlp.experts.{expert}"] for expert in range(4)]
        assert found[1] == 0 and found[2] == 128 and found[0] + found[3] == 128 and min(found[0], found[3]) > 0
    assert "2 of 8 experts met no calibration token; their levels are fitted to a few tokens of all instead: " in (
        "\n".join(said.lines)
    )
    assert len(routing_notes(store.manifest.units, 128)) == 2
    unmet = next(unit for unit in store.units if unit.name == "model.layers.0.mlp.experts.1.w2")
    assert all(np.isfinite(level.error) and level.error > 0 for level in unmet.levels)

    evaluator = Evaluator(anatomy=anatomy, store=store, splits=token_splits())
    genomes = np.ones((3, len(store.units)), dtype=np.int64)
    indices = {unit.name: index for index, unit in enumerate(store.units)}
    genomes[1, [indices[f"model.layers.0.mlp.experts.1.{matrix}"] for matrix in MATRICES]] = 0
    genomes[2, [indices[f"model.layers.0.mlp.experts.2.{matrix}"] for matrix in MATRICES]] = 0
    found = evaluator.score(genomes, split="search", windows=[0], fitness=[KL()])["kl"]
    expected = [swapped_kl(evaluator, genome, token_splits()["search"].windows[[0]]) for genome in genomes]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-6) and abs(found[2] - found[0]) > 1e-3 * found[0]
