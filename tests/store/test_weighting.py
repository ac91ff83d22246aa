import pytest
import torch

from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import SettingError
from evosweep.models import attention
from evosweep.models.anatomy import Anatomy
from evosweep.store import calibrate
from evosweep.store.build import StoreBuilder
from evosweep.store.statistics.walk import measure_inputs
from evosweep.store.store_plan import plan_store
from evosweep.store.weighting import WEIGHTINGS
from tests.models.test_anatomy import FAMILIES, small
from tests.models.test_dropping import splits


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_received_is_that_of_the_model(family: str, monkeypatch) -> None:
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", 4 * 12 * 5)  # parts of windows and queries
    model = small(family, **FAMILIES[family])
    anatomy = Anatomy(model)
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = anatomy.embed(tokens)
        found = []
        for block in range(3):
            found.append(attention.attention_received(anatomy, block, hidden))
            hidden = anatomy.run_block(block, hidden)
        model.set_attn_implementation("eager")
        expected = model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    for ours, probabilities in zip(found, expected, strict=True):
        assert torch.allclose(ours, probabilities.sum(dim=(1, 2)), atol=1e-4)


def by_hand(rows: torch.Tensor, received: torch.Tensor, name: str) -> torch.Tensor:
    """Return the mean of w·x xᵀ in float64, token by token."""
    total = torch.zeros(rows.shape[-1], rows.shape[-1]).double()
    for window, attention_of_window in zip(rows.double(), received.double(), strict=True):
        low, high = attention_of_window.min(), attention_of_window.max()
        importance = 0.005 + (attention_of_window - low) / (high - low) * 0.995
        importance = importance / importance.mean()
        median = window.norm(dim=1).sort().values[(len(window) - 1) // 2]
        for x, r in zip(window, importance, strict=True):
            weight = {
                "plain": 1.0,
                "relative": 1 / (x @ x),
                "root": (x @ x) ** -0.5,
                "clipped": 1 / max(x @ x, median**2),
                "attention": r,
                "relative_attention": r / (x @ x),
            }[name]
            total += weight * torch.outer(x, x)
    return total / rows.shape[:2].numel()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_second_moments_of_a_block_are_weighted_as_defined(name: str) -> None:
    model = small("llama")
    anatomy = Anatomy(model)
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    watched = {}
    slots = {slot.name.rsplit(".", 1)[1]: slot for slot in anatomy.slots_of(1)}
    handles = [slot.watch_inputs(lambda inputs, key=key: watched.update({key: inputs})) for key, slot in slots.items()]
    with torch.no_grad():
        hidden = anatomy.run_block(0, anatomy.embed(tokens))
        anatomy.run_block(1, hidden)
        model.set_attn_implementation("eager")
        received = model(input_ids=tokens, output_attentions=True).attentions[1].sum(dim=(1, 2))
        for handle in handles:
            handle.remove()
        model.set_attn_implementation("sdpa")
        found = [
            measure_inputs(anatomy, 1, hidden.split(at_once), needs={"second_moment"}, weighting=WEIGHTINGS[name])
            for at_once in (4, 1)  # nothing depends on the batches
        ]
    for layer in ("q_proj", "o_proj", "down_proj"):
        expected = by_hand(watched[layer], received, name)
        for measured in found:
            moment = measured[slots[layer].group]["second_moment"].double()
            assert torch.allclose(moment, expected, rtol=1e-3, atol=1e-4 * float(expected.diagonal().mean()))


def test_every_weighting_builds_a_store_of_a_family_that_flattens_windows(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    anatomy, texts = Anatomy(small("opt", **FAMILIES["opt"])), splits()
    plan = plan_store(anatomy, RoundToNearest(bits=[2, 4], group=16))
    keys = set()
    for name in WEIGHTINGS:
        store = StoreBuilder(token_weighting=name).open(plan, texts["calibration"], model_name="opt")
        keys.add(store.key)
        assert all(0 < level.relative_error < 1 for unit in store.units for level in unit.levels)
    assert len(keys) == len(WEIGHTINGS)


def test_a_model_whose_attention_cannot_be_read_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    model = small("llama")
    anatomy, texts = Anatomy(model), splits()
    ours = model.model.layers[1].self_attn
    monkeypatch.setattr(ours, "forward", lambda hidden_states, **_: (ours.o_proj(ours.v_proj(hidden_states)), None))
    monkeypatch.setattr(ours, "v_proj", torch.nn.Linear(32, 32))
    monkeypatch.setattr(calibrate.Walk, "run", None)
    plan = plan_store(anatomy, RoundToNearest(bits=[2, 4], group=16))
    with pytest.raises(
        SettingError, match=r"token_weighting must be one of relative, plain.* got 'attention'; .*block 1"
    ):
        StoreBuilder(token_weighting="attention").open(plan, texts["calibration"], model_name="llama")
    assert model.config._attn_implementation == "sdpa" and attention.NAME not in attention.ALL_ATTENTION_FUNCTIONS
