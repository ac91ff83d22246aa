"""Models that cannot be scored block by block are run whole, or refused before any work."""

import re

import pytest
import torch

from evosweep.core.errors import ModelError
from evosweep.models.anatomy import Anatomy
from tests.models.beside import CHAIN, WHOLE, made
from tests.models.test_anatomy import small


def test_nan_names_the_type() -> None:
    model = small("llama").to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"NaN or infinite in float16: choose another model\.dtype"):
        Anatomy(model)


def test_blocks_that_need_the_tokens_leave_the_model_whole() -> None:
    """A block that reads the tokens past its arguments cannot be run alone; here a Llama's does."""
    model = small("llama")
    block, inner = model.model.layers[1], model.model.forward
    plain = block.forward
    ids: list[torch.Tensor] = []

    def remember(input_ids=None, **more):
        ids[:] = [input_ids]
        return inner(input_ids=input_ids, **more)

    model.model.forward = remember
    block.forward = lambda hidden, *args, **more: plain(hidden, *args, **more) + model.model.embed_tokens(ids[0])
    because = Anatomy(model).whole_because
    assert re.fullmatch(r"run one by one they give other logits, off by 0\.\d+ of the largest", because)


def test_blocks_that_share_a_cache_leave_the_model_whole() -> None:
    assert Anatomy(made(WHOLE["gemma4_shared"]())).whole_because
    assert not Anatomy(made(CHAIN["gemma4"]())).whole_because


def test_a_layer_whose_rows_cannot_be_told_apart_is_no_slot() -> None:
    """It mixes the rows of a batch where the population's are, so that a row has no weight of its own."""
    model = small("llama")
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: plain(hidden.transpose(0, 1)).transpose(0, 1)
    anatomy = Anatomy(model)
    names = {slot.name for slot in anatomy.slots}
    assert set(anatomy.not_by_row) == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert len(names) == 18 and not names & set(anatomy.not_by_row)


def test_the_check_is_cheap() -> None:
    model = small("llama")
    tokens: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: tokens.append(args[0].shape[:2].numel()))
    Anatomy(model)
    assert sum(tokens) <= 192  # each batch of it for a reason: see Anatomy
