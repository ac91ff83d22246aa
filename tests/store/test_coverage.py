"""What share of the blocks' weights units cover, and which layers are no units."""

import pytest
import torch
import transformers

from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def mixture() -> Anatomy:
    """Two blocks of attention, a router for 8 experts, a shared expert with its gate."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        num_key_value_heads=4,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return Anatomy(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_units_of_a_dense_model_cover_everything(anatomy: Anatomy) -> None:
    coverage = plan_store(anatomy, RoundToNearest(group=16)).coverage
    assert coverage.share == 1.0 and not coverage.left
    assert coverage.text == "units cover 100 % of the blocks' weights"


def test_what_no_unit_covers_is_named_and_refused(mixture: Anatomy) -> None:
    with pytest.raises(
        SettingError, match=r"coverage must be at most 0\.\d+ for this model, where that is meant, "
    ) as found:
        plan_store(mixture, RoundToNearest(group=32))
    assert "no unit covers mlp.experts.gate_up_proj (2 x 65.5 k" in str(found.value)
    coverage = plan_store(mixture, RoundToNearest(group=32), units=Units(coverage=0.1)).coverage
    attention, shared, experts, rest = 4 * 64 * 64, 3 * 64 * 64, 8 * 3 * 64 * 64, 64 * 8 + 64
    assert coverage.total == 2 * (attention + shared + experts + rest)
    assert coverage.covered == 2 * (attention + shared)
    assert [(left.kind, left.count, left.weights) for left in coverage.left] == [
        ("mlp.experts.gate_up_proj", 2, 2 * 8 * 128 * 64),
        ("mlp.experts.down_proj", 2, 2 * 8 * 64 * 64),
        ("mlp.gate", 2, 2 * 8 * 64),
        ("mlp.shared_expert_gate", 2, 2 * 64),
    ]


def test_routers_and_gates_are_units_only_where_they_are_named(mixture: Anatomy) -> None:
    names = {unit.name for unit in plan_store(mixture, RoundToNearest(group=32), units=Units(coverage=0)).units}
    assert not any("gate" in name and not name.endswith("gate_proj") for name in names)
    named = Units(coverage=0, include=["*shared_expert_gate"])
    more = {unit.name for unit in plan_store(mixture, RoundToNearest(group=32), units=named).units}
    assert more - names == {f"model.layers.{block}.mlp.shared_expert_gate" for block in range(2)}
    with pytest.raises(SettingError, match=r"include must be patterns that match a layer, .* .did you mean"):
        plan_store(mixture, RoundToNearest(group=32), units=Units(coverage=0, include=["mlp.shared_expert_gat"]))


def test_a_gate_that_routes_nothing_is_a_unit(anatomy: Anatomy) -> None:
    names = {slot.name for slot in Units().layers(anatomy)}
    assert names == {slot.name for slot in anatomy.slots}


@pytest.mark.parametrize("arguments", [{"coverage": 1.5}, {"coverage": "all"}, {"include": "gate"}, {"include": [""]}])
def test_bad_settings_of_coverage(arguments: dict) -> None:
    with pytest.raises(SettingError, match=f"^{next(iter(arguments))}"):
        Units(**arguments)
