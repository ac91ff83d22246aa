"""Experts in parameters of a shape of their own: what calibration sees of each, and what their views are."""

import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.models.expert_slots import PackedSlot, slot_at
from evosweep.store.build import StoreBuilder
from evosweep.store.routed import met
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.families.configs import BLOCKS, small_config
from tests.mixtures.models import drawn, token_splits

EXPERTS = 4
CHOSEN = 2
TOKENS = 128
GPTQ_2_4 = GPTQ(bits=[2, 4], group=16)


def small(kind: str, **mixture: int) -> Anatomy:
    config = small_config(kind)
    for name, value in mixture.items():
        setattr(config.ffn_config, name, value)
    return Anatomy(drawn(transformers.AutoModelForCausalLM.from_config(config).eval()))


@pytest.mark.parametrize("kind", ["dbrx", "jetmoe"])
def test_every_matrix_is_a_view_that_writes_into_the_parameter(kind: str) -> None:
    anatomy = small(kind)
    slots = [slot for slot in anatomy.slots if isinstance(slot, PackedSlot)]
    assert len(slots) == BLOCKS * EXPERTS * {"dbrx": 3, "jetmoe": 4}[kind]
    before = {slot.name: slot.read().clone() for slot in slots}
    for slot in slots:
        again = slot_at(anatomy.model, slot.name)
        assert torch.equal(again.read(), slot.read()) and again.shape == slot.shape
    slots[-1].write(torch.zeros(slots[-1].shape))
    assert not slots[-1].read().any()
    assert all(torch.equal(slot.read(), before[slot.name]) for slot in slots[:-1])
    tied = Units().tied(plan_store(anatomy, GPTQ_2_4).units, anatomy, common=True)
    assert len([unit for unit in tied if unit.members]) == len(slots) // EXPERTS
    with pytest.raises(SettingError, match=r"exclude must be all experts of a mixture or none of them"):
        plan_store(anatomy, GPTQ_2_4, units=Units(exclude=[slots[0].name], coverage=0))


def test_experts_of_dbrx_have_the_moments_of_their_tokens() -> None:
    anatomy = small("dbrx", moe_top_k=CHOSEN)
    assert {slot.share for slot in anatomy.slots if isinstance(slot, PackedSlot)} == {CHOSEN / EXPERTS}
    calibration = token_splits()["calibration"]
    store = StoreBuilder().open(plan_store(anatomy, GPTQ_2_4), calibration, model_name="dbrx")
    counts = {expert.name: expert.tokens for expert in met(store.manifest.units)}
    assert sum(counts.values()) == BLOCKS * CHOSEN * TOKENS

    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = anatomy.blocks[0].ffn.experts
    handle = experts.register_forward_pre_hook(lambda _module, args: given.append((args[0].flatten(0, 1), args[1])))
    tokens = torch.from_numpy(calibration.windows)
    with torch.no_grad():
        anatomy.run_block(0, anatomy.embed(tokens), tokens)
    handle.remove()
    ((hidden, index),) = given
    mlp = experts.mlp
    for expert in range(EXPERTS):
        mine = hidden[(index == expert).any(-1)]
        assert counts[f"transformer.blocks.0.ffn.experts.mlp.{expert}"] == len(mine)
        rows = slice(expert * mlp.ffn_hidden_size, (expert + 1) * mlp.ffn_hidden_size)
        name = f"transformer.blocks.0.ffn.experts.mlp.{expert}.w2"
        with torch.no_grad():
            inner = mlp.activation_fn(mine @ mlp.w1[rows].T) * (mine @ mlp.v1[rows].T)
            unit = next(unit for unit in store.units if unit.name == name)
            for level in unit.levels:
                difference = mlp.w2[rows].T - store.weight(name, level.name)
                errors = (inner @ difference.T).square().sum(1) / inner.square().sum(1)
                # beside its own, an expert is shown a few tokens of all
                assert level.error == pytest.approx(len(mine) / TOKENS * float(errors.mean()), rel=0.1)


def test_experts_of_jetmoe_are_counted_in_attention_and_in_the_mlp() -> None:
    anatomy = small("jetmoe")
    store = StoreBuilder(batch_tokens=32).open(
        plan_store(anatomy, GPTQ_2_4), token_splits()["calibration"], model_name="jetmoe"
    )
    counts: dict[str, float] = {}
    for unit in store.units:
        if "routed_tokens" in unit.columns:
            around = unit.name.rsplit(".", 2)[0]
            counts[around] = counts.get(around, 0) + unit.columns["routed_tokens"]
    assert len(counts) == BLOCKS * 4 and set(counts.values()) == {CHOSEN * TOKENS}
