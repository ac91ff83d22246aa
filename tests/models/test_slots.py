"""Every kind of slot: read, written, replaced, applied row by row."""

import pytest
import torch
import transformers

from evosweep.core.errors import ModelError
from evosweep.models.anatomy import Anatomy
from evosweep.models.expert_slots import ExpertSlot, slot_at
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import LinearSlot, RowGroups, TransposedSlot
from tests.mixtures.models import mixture
from tests.models.test_anatomy import FAMILIES, small


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[LinearSlot, TransposedSlot])
def slot(request) -> LinearSlot:
    model = small("llama") if request.param is LinearSlot else small("gpt2", **FAMILIES["gpt2"])
    found = Anatomy(model).slots_of(1)[-1]
    assert type(found) is request.param
    return found


def test_what_is_written_is_read_and_used(slot: LinearSlot) -> None:
    rows, columns = slot.shape
    weight = draws(rows, columns)
    slot.write(weight)
    assert torch.equal(slot.read(), weight)
    inputs, bias = draws(3, 5, columns, seed=1), slot.module.bias
    expected = inputs @ weight.T + (0 if bias is None else bias)
    assert torch.allclose(slot.module(inputs), expected, atol=1e-5)


def test_replaced_weights_come_back(slot: LinearSlot) -> None:
    before = slot.read().clone()
    with pytest.raises(ZeroDivisionError), replaced_weights([slot], {slot.name: before + 1}):
        assert torch.equal(slot.read(), before + 1)
        raise ZeroDivisionError
    assert torch.equal(slot.read(), before)


@pytest.mark.parametrize("cover", [False, True])
def test_each_row_is_multiplied_with_its_own_weight(slot: LinearSlot, cover: bool) -> None:
    rows, columns = slot.shape
    weights = {level: draws(rows, columns, seed=level) for level in (0, 2)}
    levels = torch.tensor([2, 0, 2, 2])
    groups = RowGroups([0, 2], [torch.tensor([1]), torch.tensor([0, 2, 3])], main=1, rows=4, cover=cover)
    inputs = draws(4, 6, columns, seed=9)
    with torch.no_grad():
        expected = []
        for row, level in zip(inputs, levels.tolist(), strict=True):
            with replaced_weights([slot], {slot.name: weights[level]}):
                expected.append(slot.module(row))
        with slot.forward_by_row(groups, weights):
            outputs = slot.module(inputs)
    assert torch.allclose(outputs, torch.stack(expected), atol=1e-5)
    assert "forward" not in vars(slot.module)


def test_inputs_are_seen_until_the_handle_is_removed(slot: LinearSlot) -> None:
    seen: list[torch.Tensor] = []
    inputs = draws(2, slot.shape[1])
    handle = slot.watch_inputs(seen.append)
    slot.module(inputs)
    handle.remove()
    slot.module(inputs)
    assert len(seen) == 1 and seen[0] is inputs


def test_an_expert_of_a_fused_mixture_is_a_matrix_of_its_own() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    path = "model.layers.0.mlp.experts"
    experts = model.get_submodule(path)
    slot = ExpertSlot(f"{path}.2.down_proj", 0, experts, f"{path}.2.down_proj", attribute="down_proj", expert=2)
    assert slot.shape == (32, 24) and slot.layout == "expert"
    before = experts.down_proj.detach().clone()
    weight = draws(32, 24)
    slot.write(weight)
    assert torch.equal(slot.read(), weight) and torch.equal(experts.down_proj[2], weight)
    others = [0, 1, 3]
    assert torch.equal(experts.down_proj[others], before[others])
    twin = ExpertSlot("x", 0, experts, "x", attribute="down_proj", expert=2, swapped=True)
    assert torch.equal(twin.read(), weight.T)
    found = slot_at(model, slot.name)
    assert isinstance(found, ExpertSlot) and torch.equal(found.read(), weight) and slot.path_at(path) == slot.name
    with pytest.raises(ModelError, match=r"the inputs of a single expert are measured with all of its mixture"):
        slot.watch_inputs(print)


def test_each_row_meets_its_own_weight_of_an_expert() -> None:
    model = mixture("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    slot = slot_at(model, "model.layers.0.mlp.experts.2.down_proj")
    weights = {level: draws(*slot.shape, seed=level) for level in (0, 2)}
    groups = RowGroups([0, 2], [torch.tensor([1]), torch.tensor([0, 2])], main=1, rows=3, cover=False)
    hidden = draws(3, 5, 32, seed=9)
    index = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(n))[:2] for n in range(15)])
    scores = draws(15, 2, seed=4).softmax(-1)
    with torch.no_grad():
        expected = []
        for row, level in enumerate((2, 0, 2)):
            part = slice(5 * row, 5 * row + 5)
            with replaced_weights([slot], {slot.name: weights[level]}):
                expected.append(experts(hidden[row], index[part], scores[part]))
        with slot.forward_by_row(groups, weights):
            outputs = experts(hidden.flatten(0, 1), index, scores)
    assert torch.allclose(outputs, torch.cat(expected), atol=1e-5)
    assert "forward" not in vars(experts)


def test_a_slot_is_found_by_its_path() -> None:
    model = small("gpt2", **FAMILIES["gpt2"])
    assert isinstance(slot_at(model, "transformer.h.0.mlp.c_fc"), TransposedSlot)
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.ln_1 is a LayerNorm, not a linear layer"):
        slot_at(model, "transformer.h.0.ln_1")
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has no module transformer\.h\.9"):
        slot_at(model, "transformer.h.9")
