"""What is a unit of a mixture, what it costs, and what calibration has seen of it."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError, SettingError
from evosweep.core.events import Progress
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.auto_round import AutoRound
from evosweep.exporters.gptq_v2 import GPTQv2
from evosweep.exporters.packed import PackedSafetensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.models.mixture import watched_experts
from evosweep.store import measured
from evosweep.store import units as units_module
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.routed import met, routing_notes
from evosweep.store.statistics.walk import measure_inputs
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.mixtures.models import mixture, token_splits
from tests.models.test_dropping import NoTokenizer


class Guided(GPTQ):
    """A compressor that weighs outputs by their gradients."""

    needs = frozenset({"output_gradient_square"})


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy(mixture("mixtral"))


@pytest.fixture(scope="module")
def store(anatomy: Anatomy) -> LevelStore:
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16))
    return StoreBuilder().open(plan, token_splits()["calibration"], model_name="mixtral")


def test_all_experts_of_a_block_are_one_unit_or_each_is_its_own(anatomy: Anatomy, store: LevelStore) -> None:
    tied = Units().tied(store.units, anatomy, common=True)
    names = [unit.name for unit in tied if "experts" in unit.name]
    assert names == [
        f"model.layers.{block}.mlp.experts.*.{matrix}" for block in (0, 1) for matrix in ("gate_up_proj", "down_proj")
    ]
    unit = next(unit for unit in tied if unit.name == names[0])
    assert unit.kind == "mlp.experts.*.gate_up_proj" and len(unit.members) == 4
    assert unit.levels[1].cost == sum(layer.levels[1].cost for layer in unit.members)
    assert Units(experts="each").tied(store.units, anatomy, common=True) == store.units


def test_too_many_units_name_the_alternative(anatomy: Anatomy, store: LevelStore, monkeypatch) -> None:
    monkeypatch.setattr(units_module, "MOST_UNITS", 12)
    assert len(Units().tied(store.units, anatomy)) == 12
    with pytest.raises(SettingError) as caught:
        Units(experts="each").tied(store.units, anatomy)
    assert str(caught.value) == (
        "experts must be block, which ties the experts of a block, or a model with at most 12 units, got 'each'; "
        "every expert by itself makes 24 units here"
    )
    with pytest.raises(SettingError, match=r"experts must be .*block.*each"):
        Units(experts="blocks")


def test_experts_of_one_parameter_stay_together(anatomy: Anatomy) -> None:
    with pytest.raises(SettingError, match=r"exclude must be all experts of a mixture or none of them, got"):
        plan_store(anatomy, GPTQ(bits=[2, 4], group=16), units=Units(exclude=["*experts.1.*"], coverage=0))
    plan = plan_store(anatomy, GPTQ(bits=[2, 4], group=16), units=Units(exclude=["*experts*"], coverage=0))
    assert not [unit for unit in plan.units if "experts" in unit.name]


def test_a_budget_counts_all_weights_or_those_that_are_active(anatomy: Anatomy, store: LevelStore, tmp_path) -> None:
    tied = Units().tied(store.units, anatomy, common=True)
    whole = Budget(as_uniform=3).problem(tied, fixed_bits=store.fixed_bits)
    active = Budget(as_uniform=3, count="active").problem(tied, fixed_bits=store.fixed_bits)
    experts = sum(unit.levels[1].cost for unit in tied if unit.members)
    assert whole.budget - active.budget == experts // 2 > 0  # two of four experts
    weights = sum(unit.numel for unit in tied if unit.members)
    assert whole.numels.sum() - active.numels.sum() == weights // 2
    genome = active.uniform()
    assert (genome == 1).all() and active.cost(genome) == active.budget
    with pytest.raises(SettingError, match=r"count must be .*all.*active"):
        Budget(as_uniform=3, count="actve")
    with pytest.raises(BudgetError):
        Budget(bits_per_weight=1, count="active").problem(tied)

    texts = token_splits()
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts, units=tied)
    exporter = PackedSafetensors()
    facts = exporter.export(
        genome,
        problem=active,
        evaluator=evaluator,
        folder=tmp_path / "packed",
        loaded=LoadedModel("mixtral", anatomy.model, NoTokenizer()),
    )
    assert facts["bytes"] > whole.megabytes(whole.budget) * 1e6  # all experts are written
    assert facts["max_logit_difference"] < 1e-4


def test_an_expert_has_the_second_moment_of_its_routed_tokens(anatomy: Anatomy, store: LevelStore) -> None:
    module = anatomy.model.model.layers[0].mlp
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    shown: dict[tuple[str, int], list[torch.Tensor]] = {}

    def keep(attribute: str, expert: int, inputs: torch.Tensor, *, routed: bool) -> None:
        (seen if routed else shown).setdefault((attribute, expert), []).append(inputs)

    hidden = torch.randn(1, 70, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(hidden)
        with watched_experts(module.experts, keep, every=32):
            assert torch.allclose(module(hidden), expected, atol=1e-6)
        _, _, index = module.gate(hidden[0])
        flat = hidden[0]
        for expert in range(4):
            mine = flat[(index == expert).any(-1)]
            assert torch.equal(torch.cat(seen["gate_up_proj", expert]), mine)
            assert torch.equal(torch.cat(shown["gate_up_proj", expert]), flat[[0, 32, 64]])
            gate, up = (mine @ module.experts.gate_up_proj[expert].T).chunk(2, -1)
            assert torch.allclose(torch.cat(seen["down_proj", expert]), torch.nn.functional.silu(gate) * up, atol=1e-5)

    columns = [unit.columns for unit in store.units if ".experts." in unit.name]
    assert sum(column["routed_tokens"] for column in columns) == 2 * 2 * 2 * 128  # blocks, matrices, chosen, tokens
    assert {column["active_share"] for column in columns} == {0.5}


def test_moments_measured_in_parts_are_those_measured_at_once(anatomy, store, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    passes: list[int] = []

    def counted(*args: Any, among: Collection[str], **keywords: Any) -> Any:
        passes.append(len(among))
        return measure_inputs(*args, among=among, **keywords)

    monkeypatch.setattr(measured, "measure_inputs", counted)
    two = 2 * measured.MOMENT_ITEM * 32**2  # moments of two experts' inputs
    monkeypatch.setattr(measured, "free_bytes", lambda device: two / measured.MOMENT_SHARE)
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16))
    again = StoreBuilder().open(plan, token_splits()["calibration"], model_name="mixtral")
    assert passes == 2 * [10, 4, 2, 1, 1, 1, 1]  # all, attention and two of width 32, two more, and four of width 48
    assert again.key == store.key and again.folder != store.folder
    assert again.manifest.files == store.manifest.files  # hashes of all payloads
    assert again.manifest.units == store.manifest.units


def test_few_tokens_at_once_are_counted_as_many_are(anatomy, store, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    plan = plan_store(anatomy, GPTQ(bits=[2, 3, 4], group=16))
    few = StoreBuilder(batch_tokens=16).open(plan, token_splits()["calibration"], model_name="mixtral")
    for unit, other in zip(few.units, store.units, strict=True):
        if ".layers.0." in unit.name:  # behind it, a token may be sent elsewhere by the rounding of sums
            assert unit.columns.get("routed_tokens") == other.columns.get("routed_tokens")
            assert [level.error for level in unit.levels] == pytest.approx(
                [one.error for one in other.levels], rel=0.05
            )


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def track(self, sequence, *, description: str):
        del description
        return sequence


def test_experts_that_met_few_tokens_are_counted_and_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    model = mixture("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data = torch.tensor([50.0, 0.0, 40.0, -90.0])
    texts = token_splits()
    plan = plan_store(Anatomy(model), GPTQ(bits=[2, 4], group=16))
    said = Said()
    store = StoreBuilder().open(plan, texts["calibration"], model_name="gpt_oss", progress=said)
    counts = {expert.name: expert.tokens for expert in met(store.manifest.units)}
    assert [counts[f"model.layers.0.mlp.experts.{expert}"] for expert in range(4)] == [128, 0, 128, 0]
    assert "4 of 8 experts met no calibration token; their levels are fitted to a few tokens of all instead: " in (
        "\n".join(said.lines)
    )
    assert [line for line in said.lines if "4 of 8 experts met fewer calibration tokens than their inputs are" in line]
    never = next(unit for unit in store.units if unit.name == "model.layers.0.mlp.experts.1.down_proj")
    assert all(np.isfinite(level.error) and level.error > 0 for level in never.levels)

    enough = [
        dataclasses.replace(unit, columns={**unit.columns, "routed_tokens": 64.0 if ".1." in unit.name else 24.0})
        for unit in store.manifest.units
        if ".experts." in unit.name
    ]
    assert routing_notes(enough, 128) == [
        "3 of 8 experts met fewer calibration tokens than their inputs are wide; tokens.calibration=260 would do for "
        "nine in ten"
    ]


def test_what_cannot_hold_experts_says_so_before_the_search(anatomy: Anatomy) -> None:
    for exporter in (GPTQv2(), AutoRound()):
        with pytest.raises(SettingError, match="it has no layout for this model's transposed or fused layers"):
            exporter.check(GPTQ(bits=[4], group=32, symmetric=True), Drop(), anatomy, Units())


def test_inputs_of_experts_are_not_rounded(anatomy: Anatomy, store: LevelStore) -> None:
    with pytest.raises(SettingError, match="activations must be none for a mixture of experts"):
        Evaluator(anatomy=anatomy, store=store, splits=token_splits(), resources=Resources(activations="int8"))


def test_what_experts_cannot_be_calibrated_for_is_refused(anatomy: Anatomy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    with pytest.raises(SettingError, match=r"needs no output_gradient_square, which is not measured of single experts"):
        plan_store(anatomy, Guided(bits=[2, 4], group=16))
    plan = plan_store(anatomy, GPTQ(bits=[2, 4], group=16))
    builder = StoreBuilder(token_weighting="clipped")
    with pytest.raises(SettingError, match=r"token_weighting must be one of relative, plain, root for a mixture"):
        builder.open(plan, token_splits()["calibration"], model_name="mixtral")
