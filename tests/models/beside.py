"""Small models whose blocks are given, or hand on, more than hidden states: how to build them."""

from collections.abc import Callable

import torch
import transformers

from tests.models.test_anatomy import small

V = 64
GEMMA = {
    "vocab_size": V,
    "vocab_size_per_layer_input": V,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
ALTERNATE = ["sliding_attention", "full_attention"]


def _gemma3n() -> transformers.PretrainedConfig:
    return transformers.Gemma3nTextConfig(
        **GEMMA,
        num_hidden_layers=3,
        laurel_rank=16,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 3,
        layer_types=[*ALTERNATE, "full_attention"],
    )


def _gemma4(shared: int = 0) -> transformers.PretrainedConfig:
    layers = 2 + 2 * shared
    kinds = (ALTERNATE * layers)[:layers]
    return transformers.Gemma4TextConfig(
        **GEMMA, global_head_dim=8, num_hidden_layers=layers, num_kv_shared_layers=shared, layer_types=kinds
    )


def _deepseek_v4() -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(
        "deepseek_v4",
        vocab_size=V,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        num_experts_per_tok=2,
        n_routed_experts=4,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        sliding_window=8,
        num_nextn_predict_layers=0,
    )


CHAIN: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=V, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "falcon_alibi": lambda: transformers.FalconConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, bias=True
    ),
    "openai_gpt": lambda: transformers.OpenAIGPTConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma4": _gemma4,
    "mamba": lambda: transformers.MambaConfig(vocab_size=V, hidden_size=32, state_size=8, num_hidden_layers=2),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=V,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        chunk_size=8,
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "lfm2": lambda: small_config("lfm2", layer_types=["conv", "full_attention", "conv"]),
    "falcon_h1": lambda: small_config("falcon_h1", num_hidden_layers=2, mamba_d_ssm=64, **MAMBA),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=V, hidden_size=32, attention_hidden_size=32, num_hidden_layers=4, context_length=64, rescale_every=2
    ),
    "bamba": lambda: small_config("bamba", attn_layer_indices=[1], **MAMBA),
}
"""Models whose blocks can be run one by one, by name."""

WHOLE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gemma3n": _gemma3n,
    "gemma4_shared": lambda: _gemma4(shared=2),
    "deepseek_v4": _deepseek_v4,
}
"""Models whose blocks cannot be run one by one, by name."""


def small_config(kind: str, **more: object) -> transformers.PretrainedConfig:
    """Return the config of a small model of a type, with further settings."""
    return small(kind, **more).config


def made(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model of random weights, biases and gains too, so that each of them matters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=draws)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)
    model.tie_weights()
    return model.to(dtype)
