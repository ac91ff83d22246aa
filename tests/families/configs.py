"""Configs of small models: every family of transformers with hidden size 64, found from the names of its fields."""

import dataclasses
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 264
BLOCKS = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("attention_hidden_size", "embedding_dim", "emb_dim", "output_embedding_size"), 64),
    **dict.fromkeys(("input_embedding_size", "hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dff"), 96),
    **dict.fromkeys(("dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("ffn_hidden_size", "mlp_dim", "prefix_dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_blocks"), BLOCKS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads", "linear_num_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_query_groups", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "linear_head_dim", "dim_head", "d_head", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("kv_channels", "attention_head_size", "query_pre_attn_scalar", "index_head_dim"), 16),
    "qk_head_dim": 24,
    "qk_rope_head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "o_lora_rank": 16,
    "o_groups": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_n_heads": 2,
    "index_topk": 64,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "max_position_embeddings": 128,
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "attention_window_size"), 8),
    "sliding_window_size": 8,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    "eos_token_id": 1,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 16,
    "router_hidden_size": 16,
    "rotary_dim": 8,
    "pretraining_tp": 1,
    "type_vocab_size": 2,
    "num_nextn_predict_layers": 0,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "embd_pdrop": 0.0,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA3N = {"layer_types": SLIDING, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]}
QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64},
    **{"indexer_compress_ratio": 4, "ple_embed_dim": 64, "hc_lowrank": 8, "ngram_vocab_size_base": 100},
}
DOTS3 = {
    "num_key_value_heads": 4,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "per_layer_config": {
        1: {"kv_lora_rank": 16, "qk_nope_head_dim": 8},
        3: {"kv_lora_rank": 16, "qk_nope_head_dim": 8},
    },
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), MROPE),
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}},
    "cosmos3_edge_text": MROPE,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": DOTS3,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": {"layer_types": SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8},
    "olmo_hybrid": {"layer_types": HYBRID},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 16},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        **{"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False},
        **{"lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "num_buckets": 4},
    },
    "roc_bert": {
        **{"shape_vocab_size": 32, "shape_embed_dim": 16, "pronunciation_vocab_size": 32},
        "pronunciation_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128, "attention_head_dim": 32},
        **{"num_key_value_heads": 4, "mamba_dt_rank": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    },
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "n_mamba_heads": 4},
        **{"mamba_headdim": 32, "attention_hidden_size": 128, "attention_head_dim": 32, "adapter_rank": 8},
        **{"num_query_groups": 4, "kv_channels": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}


CAUSAL = "AutoModelForCausalLM"
SEEING = "AutoModelForImageTextToText"


def families() -> dict[str, str]:
    """Return the class of transformers that loads each family, by model type."""
    seeing = dict.fromkeys(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, SEEING)
    return {**dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CAUSAL), **seeing}


def small_config(kind: str) -> Any:
    """Return the config of a small model of a family."""
    known = CONFIG_MAPPING[kind]
    return known(**_sizes(known))


def _sizes(known: type) -> dict[str, Any]:
    """Return small values of those of a config's fields whose names are known."""
    names = {field.name for field in dataclasses.fields(known)}
    found = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention expands to as many heads as there are queries
        found["num_key_value_heads"] = found["num_attention_heads"]
    if "is_decoder" in names:
        found["is_decoder"] = True
    for name, kind in getattr(known, "sub_configs", {}).items():
        if kind is transformers.AutoConfig:
            default = getattr(known(), name)
            if default is not None:
                found[name] = {"model_type": default.model_type, **_sizes(type(default))}
        else:
            found[name] = _sizes(kind)
    return _merged(found, EXCEPTIONS.get(getattr(known, "model_type", ""), {}))


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return values with changes, those of sections inside the sections."""
    inside = {
        name: _merged(values[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and isinstance(values.get(name), dict)
    }
    return {**values, **changes, **inside}
