"""Sub-blocks: what their output is, which weights are gone with them, and what cannot be dropped."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop, dropped_parameters, merged, removed
from evosweep.models.sublayers import silenced, silenced_rows
from tests.models.test_anatomy import small

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def parts(anatomy: Anatomy, block: int) -> dict[str, str]:
    """Return the module that is cut, by sub-block, as paths inside of the block."""
    path = f"{anatomy.block_path}.{block}."
    found = [sublayer for sublayer in anatomy.sublayers if sublayer.block == block]
    return {one.name.removeprefix(path): one.writer.removeprefix(path) for one in found}


def test_a_mixture_is_dropped_with_router_and_experts() -> None:
    anatomy = Anatomy(small("mixtral", **MIXTURE))
    assert parts(anatomy, 1) == {"self_attn": "self_attn", "mlp": "mlp"}
    mlp = next(one for one in anatomy.sublayers if one.name == "model.layers.1.mlp")
    assert {id(parameter) for parameter in mlp.parameters} == {id(p) for p in anatomy.blocks[1].mlp.parameters()}
    effects = [option.effect for option in Drop(granularity="sublayers").options(anatomy)]
    tokens = torch.arange(6)[None]
    with torch.no_grad(), silenced(anatomy.blocks[1].mlp):
        expected = anatomy.model(input_ids=tokens, use_cache=False).logits
    with torch.no_grad(), removed(anatomy, [effect for effect in effects if effect.writer == mlp.name]):
        assert not any(parameter.any() for parameter in anatomy.blocks[1].mlp.parameters())
        assert torch.equal(anatomy.model(input_ids=tokens, use_cache=False).logits, expected)
    assert all(bool(parameter.any()) for parameter in anatomy.blocks[1].mlp.parameters())
    assert dropped_parameters(anatomy, [effects[3]]) == {id(parameter) for parameter in mlp.parameters}


def test_a_module_that_adds_the_stream_itself_is_cut_behind_its_last_layer() -> None:
    """BLOOM's attention and MLP are given the residual stream and return the sum: their output must not be zero."""
    anatomy = Anatomy(small("bloom", n_layer=3, n_head=4))
    assert parts(anatomy, 0) == {"self_attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}


def test_a_norm_behind_a_sub_block_stays() -> None:
    """BERT normalizes the sum of stream and sub-block: the norm's gain is no part of what is gone."""
    anatomy = Anatomy(small("bert", is_decoder=True, intermediate_size=48))
    attention = next(one for one in anatomy.sublayers if one.name.endswith(".0.attention"))
    assert attention.writer.endswith("attention.output.dense")
    gone = {id(parameter) for parameter in attention.parameters}
    output = anatomy.blocks[0].attention.output
    assert id(output.dense.weight) in gone
    assert id(output.LayerNorm.weight) not in gone


def test_attention_whose_keys_others_use_stays() -> None:
    """The last two blocks of a Gemma 3n take keys and values from the two before."""
    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"layer_types": kinds, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "head_dim": 8}
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 8}
    anatomy = Anatomy(small("gemma3n_text", **{**more, **sizes, "num_hidden_layers": 4}))
    assert [block for block in range(4) if "self_attn" in parts(anatomy, block)] == [2, 3]
    assert all("mlp" in parts(anatomy, block) for block in range(4))
    with pytest.raises(SettingError, match=r"layers\.0 leaves keys and values for later blocks, and 3 more"):
        Drop(granularity="blocks").options(anatomy)


def test_parts_that_share_parameters_are_refused_by_name() -> None:
    model = small("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(SettingError, match=r"layers\.0\.mlp shares parameters with model\.layers\.2\.mlp\.gate_proj"):
        Drop(granularity="sublayers").options(Anatomy(model))
    with pytest.raises(SettingError, match=r"layers\.0 shares parameters with model\.layers\.2\.mlp"):
        Drop(granularity="blocks").options(Anatomy(model))
    kept = Drop(granularity="blocks", keep=[0, 2]).options(Anatomy(model))
    assert [option.name for option in kept] == ["model.layers.1"]


def test_rows_are_silenced_apart_and_further_outputs_stay() -> None:
    class Two(nn.Module):
        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return inputs + 1, inputs

    module = Two()
    given = torch.ones(6, 3, 2)
    with silenced_rows(module, np.array([1]), 3):
        changed, other = module(given)
    assert changed[:, 0, 0].tolist() == [2, 2, 0, 0, 2, 2]
    assert torch.equal(other, given)
    assert torch.equal(module(given)[0], given + 1)


def test_a_block_without_sub_blocks_is_dropped_where_the_config_can_say_so() -> None:
    anatomy = Anatomy(small("llama"))
    effects = [option.effect for option in Drop(granularity="sublayers").options(anatomy) if option.blocks == (1,)]
    assert [(effect.blocks, effect.whole) for effect in merged(anatomy, effects)] == [((1,), True)]
    other = Anatomy(small("diffllama"))  # its constants depend on a block's index
    effects = [option.effect for option in Drop(granularity="sublayers").options(other) if option.blocks == (1,)]
    assert [effect.whole for effect in merged(other, effects)] == [False, False]
    assert isinstance(other.model, transformers.DiffLlamaForCausalLM)
