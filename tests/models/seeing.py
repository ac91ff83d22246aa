"""Small random models of images and text, their vision towers as deep as the text decoder."""

from pathlib import Path
from typing import Any

import torch
import transformers

from evosweep.models.load import byte_tokenizer

TEXT = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
QWEN_TOKENS = {"image_token_id": 256, "video_token_id": 257, "vision_start_token_id": 258, "vision_end_token_id": 259}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14}
CONFIGS: dict[str, Any] = {
    "llava": lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
        image_token_index=256,
        image_seq_length=4,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT},
        vision_config={"model_type": "pixtral", **VISION},
        image_token_index=256,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={"model_type": "gemma3_text", **TEXT},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        mm_tokens_per_image=4,
        image_token_index=256,
        boi_token_index=257,
        eoi_token_index=258,
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config={"model_type": "qwen2_vl_text", **TEXT, **SECTIONS},
        vision_config={"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **QWEN_VISION},
        **QWEN_TOKENS,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={"model_type": "qwen2_5_vl_text", **TEXT, **SECTIONS},
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "fullatt_block_indexes": [1],
            **QWEN_VISION,
        },
        **QWEN_TOKENS,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config={"model_type": "qwen3_vl_text", **TEXT, **SECTIONS},
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
            **QWEN_VISION,
        },
        **QWEN_TOKENS,
    ),
}


def seeing_tokenizer() -> Any:
    """Return a tokenizer of bytes and of the tokens that stand for an image, 256, and for its ends, 257 and 258."""
    tokenizer = byte_tokenizer()
    named = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(named.values())})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=named
    )


def processor_of(family: str) -> Any:
    """Return the processor of a family: llava or gemma3."""
    tokenizer = seeing_tokenizer()
    if family == "gemma3":
        images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        return transformers.Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save_seeing(family: str, folder: Path) -> Path:
    """Write a random checkpoint of a family; of llava and gemma3 with its processor."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    if family in ("llava", "gemma3"):
        processor_of(family).save_pretrained(folder)
    seeing_tokenizer().save_pretrained(folder)
    return folder
