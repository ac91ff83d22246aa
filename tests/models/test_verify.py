"""Models that cannot be scored block by block are refused before any work."""

import pytest
import torch
import transformers

from evosweep.core.errors import ModelError
from evosweep.models.anatomy import Anatomy
from tests.models.test_anatomy import small


def test_nan_names_the_type() -> None:
    model = small("llama").to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"NaN or infinite in float16: choose another model\.dtype"):
        Anatomy(model)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        transformers.XGLMConfig(
            vocab_size=64, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64
        ),
    ],
    ids=["bloom", "xglm"],
)
def test_masks_by_batch_are_refused_in_one_line(config) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=r"the blocks of .* cannot be run one by one on several rows at once") as found:
        Anatomy(model)
    assert "\n" not in str(found.value)


def test_blocks_that_need_the_tokens_are_refused_with_the_difference() -> None:
    """Gemma 4 adds embeddings of the tokens in every block; here a Llama does."""
    model = small("llama")
    block, inner = model.model.layers[1], model.model.forward
    plain = block.forward
    ids: list[torch.Tensor] = []

    def remember(input_ids=None, **more):
        ids[:] = [input_ids]
        return inner(input_ids=input_ids, **more)

    model.model.forward = remember
    block.forward = lambda hidden, *args, **more: plain(hidden, *args, **more) + model.model.embed_tokens(ids[0])
    with pytest.raises(
        ModelError, match=r"run block by block gives other logits than the whole model, off by 0\.\d+ of"
    ):
        Anatomy(model)


def test_the_check_is_cheap() -> None:
    model = small("llama")
    tokens: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: tokens.append(args[0].shape[:2].numel()))
    Anatomy(model)
    assert sum(tokens) <= 128
