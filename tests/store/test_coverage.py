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


def test_what_no_unit_covers_is_named_and_refused() -> None:
    config = transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=16)
    states = Anatomy(transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(
        SettingError, match=r"coverage must be at most 0\.9\d* for this model, where that is meant, "
    ) as found:
        plan_store(states, RoundToNearest(group="auto"))
    assert "no unit covers mixer.A_log (2 x 2.05 k, 6.3 %), mixer.conv1d (2 x 512, " in str(found.value)
    coverage = plan_store(states, RoundToNearest(group="auto"), units=Units(coverage=0.9)).coverage
    projections = 256 * 64 + 64 * 128 + (4 + 2 * 16) * 128
    assert coverage.total == 2 * (projections + 128 * 16 + 128 * 4 + 128 * 4)
    assert coverage.covered == 2 * projections
    assert {(left.kind, left.count, left.weights) for left in coverage.left} == {
        ("mixer.A_log", 2, 2 * 128 * 16),
        ("mixer.conv1d", 2, 2 * 128 * 4),
        ("mixer.dt_proj", 2, 2 * 128 * 4),
    }


def test_experts_count_one_by_one(mixture: Anatomy) -> None:
    coverage = plan_store(mixture, RoundToNearest(group=32)).coverage
    attention, shared, experts, rest = 4 * 64 * 64, 3 * 64 * 64, 8 * 3 * 64 * 64, 64 * 8 + 64
    assert coverage.total == 2 * (attention + shared + experts + rest)
    assert coverage.covered == 2 * (attention + shared + experts)
    assert [(left.kind, left.count, left.weights) for left in coverage.left] == [
        ("mlp.gate", 2, 2 * 8 * 64),
        ("mlp.shared_expert_gate", 2, 2 * 64),
    ]


def test_routers_and_gates_are_units_only_where_they_are_named(mixture: Anatomy) -> None:
    names = {unit.name for unit in plan_store(mixture, RoundToNearest(group=32), units=Units(coverage=0)).units}
    assert names and not any(name.endswith((".gate", "_gate")) for name in names)
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
