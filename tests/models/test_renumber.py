"""Configs follow the blocks that stay, and where they cannot, that is said before any work."""

import pytest
import torch

from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.renumber import rehearse, without_blocks
from tests.models.test_anatomy import GEMMA3, small

DEEPSEEK = {
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
}
LLAMA4 = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "moe_layers": [0, 2]}


def test_counts_of_first_blocks_follow() -> None:
    anatomy = Anatomy(small("deepseek_v3", **DEEPSEEK))
    config = anatomy.model.config
    for gone, left in (({0}, 0), ({1}, 1), ({0, 2}, 0)):
        with without_blocks(anatomy, gone):
            assert config.first_k_dense_replace == left
            assert config.num_hidden_layers == 3 - len(gone)
        assert rehearse(anatomy, gone) == ""
    assert (config.first_k_dense_replace, config.num_hidden_layers) == (1, 3)


def test_lists_of_indices_and_of_kinds_follow() -> None:
    anatomy = Anatomy(small("llama4_text", **LLAMA4))
    config = anatomy.model.config
    kinds = list(config.layer_types)
    with without_blocks(anatomy, {0}):
        assert config.moe_layers == [1]
        assert config.layer_types == kinds[1:]
    assert config.moe_layers == [0, 2]
    assert rehearse(anatomy, {0}) == ""


def test_tables_by_index_follow() -> None:
    """A table of what single blocks have otherwise is numbered anew, and put back."""
    model = small("llama")
    model.config.per_layer_config = {2: {"attention_dropout": 0.5}}
    anatomy = Anatomy(model)
    with without_blocks(anatomy, {0}):
        assert model.config.to_dict()["per_layer_config"] == {"1": {"attention_dropout": 0.5}}
    assert model.config.to_dict()["per_layer_config"] == {"2": {"attention_dropout": 0.5}}


def test_a_scale_by_the_number_of_blocks_follows() -> None:
    more = {key: DEEPSEEK[key] for key in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")}
    anatomy = Anatomy(small("minicpm3", scale_depth=1.4, num_key_value_heads=4, v_head_dim=8, **more))
    with without_blocks(anatomy, {1}):
        assert anatomy.model.config.scale_depth == pytest.approx(1.4 * (2 / 3) ** 0.5)
    assert rehearse(anatomy, {1}) == ""
    assert anatomy.model.config.scale_depth == 1.4


def test_no_memory_is_taken_for_a_rehearsal() -> None:
    anatomy = Anatomy(small("gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=GEMMA3))
    before = {name: parameter.clone() for name, parameter in anatomy.model.named_parameters()}
    assert rehearse(anatomy, {1}) == ""
    assert all(torch.equal(parameter, before[name]) for name, parameter in anatomy.model.named_parameters())
    assert len(anatomy.blocks) == 3


def test_what_depends_on_an_index_is_refused_before_any_work() -> None:
    anatomy = Anatomy(small("diffllama"))
    assert "lambda_init" in rehearse(anatomy, {0})
    assert rehearse(anatomy, {2}) == ""  # nothing behind it is numbered anew
    message = (
        r"granularity must be sublayers.*got 'blocks'; without block 0 model\.layers\.0\.self_attn\.lambda_init is"
    )
    with pytest.raises(SettingError, match=message) as caught:
        Drop(granularity="blocks").check_export(anatomy)
    assert "\n" not in str(caught.value)
    Drop(granularity="blocks", keep=[0, 1]).check_export(anatomy)
    Drop(granularity="sublayers").check_export(anatomy)
