"""Adapters of peft that are merged at loading: what does not belong to the base model is refused, not left out."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

from evosweep.core.errors import ModelError
from evosweep.core.events import Silent
from evosweep.models.load import HuggingFace, byte_tokenizer
from evosweep.testing.tiny import tiny_config


def save_base(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(tiny_config(**changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, settings=None):
    """Return the wrapped model, its adapter saved with weights that are not zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, settings or peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped


def load(folder: Path):
    return HuggingFace(path=str(folder), dtype="float32", device="cpu", adapter="merge").load(progress=Silent()).model


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as found:
        load(folder)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    save_adapter(base, tmp_path / "adapter")
    load(tmp_path / "adapter")
    save_base(base)  # two blocks: peft leaves the weights of the third out
    assert "which has no layer for base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight (2" in refusal(
        tmp_path / "adapter"
    )


def test_an_adapter_of_a_shallower_model_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    save_base(base, num_hidden_layers=3)
    assert "which gets nothing for base_model.model.model.layers.2.self_attn.q_proj.lora_A" in refusal(
        tmp_path / "adapter"
    )


def test_an_adapter_without_weights_or_with_prompts_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert f"{weights}, 500 bytes, is cut off" in refusal(tmp_path / "adapter")
    weights.unlink()
    assert refusal(tmp_path / "adapter").endswith("has no weights (adapter_model.safetensors)")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    save_adapter(base, tmp_path / "prompts", prompts)
    assert "is an adapter of prompts (PROMPT_TUNING): it has no weights to merge" in refusal(tmp_path / "prompts")


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    message = refusal(tmp_path / "adapter")
    assert f"got '{tmp_path / 'base'}'" in message and message.endswith("there is no such folder")


def test_a_head_of_an_adapter_stays_its_own_where_the_base_is_tied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = save_adapter(base, tmp_path / "adapter", settings).eval()
    model = load(tmp_path / "adapter").eval()
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=tokens).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
