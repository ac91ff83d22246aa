"""Small mixtures of experts with random weights, biases and gains, one for each way that transformers builds them."""

import numpy as np
import torch
import transformers

from evosweep.data.tokens import TokenSplit

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "olmoe": {"num_experts": 4, "intermediate_size": 16},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size": 16,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
    },
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 16},
    "qwen3_next": {
        **LINEAR,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [],
    },
}
"""Settings by the model's type. DeepSeek's first layer and one of Llama 4's are dense; those two and Qwen3-Next have
experts that all tokens go to."""


def mixture(kind: str, **more: object) -> torch.nn.Module:
    """Return a causal language model; every parameter is drawn, so that no bias is zero and no gain one."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MIXTURES[kind], **more})
    return drawn(transformers.AutoModelForCausalLM.from_config(config).eval())


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Draw every parameter of a model, and return it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and "bias" not in name
            parameter.copy_(1 + 0.2 * drawn if gain else 0.2 * drawn)
    return model


def token_splits(windows: int = 8, tokens: int = 16) -> dict[str, TokenSplit]:
    """Return windows of random tokens."""
    rng = np.random.default_rng(0)
    names = ("calibration", "search", "validation")
    return {name: TokenSplit(name, rng.integers(0, 64, (windows, tokens)), ("x",)) for name in names}
