import logging
import sys

import pytest
import torch

from evosweep.models import fused
from evosweep.models.fused import _or_plain, logits_and_sum


def test_where_compiling_fails_the_plain_function_takes_over_and_it_is_said_once(caplog) -> None:
    tried: list[int] = []

    def broken(_value):
        tried.append(1)
        raise RuntimeError("no C compiler")

    call = _or_plain(broken, lambda value: value + 1)
    with caplog.at_level(logging.WARNING):
        assert [call(1), call(2)] == [2, 3]
    assert len(tried) == 1 and caplog.text.count("torch.compile does not work here") == 1


def test_out_of_memory_is_no_failure_of_the_compiler() -> None:
    def full(_value):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        _or_plain(full, lambda value: value)(1)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 50)])
def test_the_sum_is_over_the_logits(bias) -> None:
    draws = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 16, generator=draws), torch.randn(50, 16, generator=draws)
    logits, total = logits_and_sum(hidden, weight, bias, compiled=False)
    assert torch.allclose(total, logits.double().exp().sum(1).log().float(), atol=1e-4)


def test_rotary_embeddings_are_compiled_for_a_while(loaded, monkeypatch) -> None:
    module = sys.modules[type(loaded.model.model.layers[0].self_attn).__module__]
    plain, ran = module.apply_rotary_pos_emb, []

    def compiled(function, **_):
        def call(*args, **kwargs):
            ran.append(args[0].shape)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    fused._rotary.cache_clear()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = loaded.model(input_ids=tokens).logits
        with fused.fused_rotary(loaded.model):
            assert module.apply_rotary_pos_emb is not plain
            assert torch.equal(loaded.model(input_ids=tokens).logits, expected)
        assert len(ran) == 2  # blocks
        with pytest.raises(ZeroDivisionError), fused.fused_rotary(loaded.model):
            raise ZeroDivisionError
    fused._rotary.cache_clear()
    assert module.apply_rotary_pos_emb is plain


def test_a_model_without_rotary_embeddings_is_left_alone() -> None:
    with fused.fused_rotary(torch.nn.Linear(2, 2)):
        pass
