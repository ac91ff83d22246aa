import pytest
import torch
import transformers

from evosweep.core.errors import ModelError
from evosweep.models.anatomy import Anatomy


def small(kind: str, **more):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **more})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class Opaque(torch.nn.Module):
    """A linear layer of a kind that nobody knows."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(layer.weight.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.matrix.T


GEMMA3 = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": GEMMA3},
    "phi3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"max_position_embeddings": 64},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return small(request.param, **FAMILIES[request.param])


def test_block_by_block_is_the_model(model) -> None:
    anatomy = Anatomy(model)
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = anatomy.embed(tokens)
        for block in range(3):
            hidden = anatomy.run_block(block, hidden)
        final = anatomy.finish(tokens, hidden)
        logits = torch.stack([anatomy.head.logits(row) for row in final])
        expected = model(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def test_units_are_all_linears_of_the_blocks(model) -> None:
    anatomy = Anatomy(model)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linears = [module for module in anatomy.blocks.modules() if isinstance(module, kinds)]
    assert {id(slot.module) for slot in anatomy.slots} == {id(module) for module in linears}
    assert {slot.block for slot in anatomy.slots} == {0, 1, 2}
    for slot in anatomy.slots:
        transposed = isinstance(slot.module, transformers.pytorch_utils.Conv1D)
        assert slot.layout == ("transposed" if transposed else "linear")
        assert slot.shape == (slot.module.weight.shape[::-1] if transposed else slot.module.weight.shape)


def test_forwards_are_put_back(model) -> None:
    Anatomy(model).embed(torch.zeros((1, 4), dtype=torch.long))
    assert not any("forward" in vars(module) for module in model.modules())


def test_query_key_value_share_their_input() -> None:
    groups: dict[str, list[str]] = {}
    for slot in Anatomy(small("llama")).slots_of(1):
        groups.setdefault(slot.group.rsplit(".", 1)[1], []).append(slot.name.rsplit(".", 1)[1])
    assert groups == {
        "q_proj": ["q_proj", "k_proj", "v_proj"],
        "o_proj": ["o_proj"],
        "gate_proj": ["gate_proj", "up_proj"],
        "down_proj": ["down_proj"],
    }


def test_soft_capped_heads_take_the_general_path() -> None:
    assert not Anatomy(small("gemma2", head_dim=8, query_pre_attn_scalar=8)).head.linear
    assert Anatomy(small("llama")).head.linear


def test_a_model_without_linears_says_what_it_has() -> None:
    model = small("llama")
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Opaque(child))
    with pytest.raises(ModelError, match=r"no linear layer that we know, only .*Opaque"):
        Anatomy(model)


def test_a_model_without_blocks_says_what_it_looked_at() -> None:
    model = small("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"layers.*7 blocks"):
        Anatomy(model)
