"""The output head's GPU kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from evosweep.fitness import base
from evosweep.fitness.base import Outputs, rows_at_once
from evosweep.fitness.kl import KL
from evosweep.models import fused
from evosweep.models.head import Head

pytest.importorskip("triton")
from evosweep.models import head_kernel
from evosweep.models.head_kernel import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(tokens=64, vocabulary=64, hidden=32, warps=4, stages=2)


def draw(tokens: int, hidden: int, vocabulary: int, *, biased: bool) -> tuple[torch.Tensor, ...]:
    """Return hidden states, weight, bias or None, and labels; fp16, as the interpreter has no bfloat16."""
    draws = torch.Generator().manual_seed(tokens + hidden)
    states = torch.randn(tokens, hidden, generator=draws).half()
    weight = (torch.randn(vocabulary, hidden, generator=draws) * 3 / hidden**0.5).half()
    bias = torch.randn(vocabulary, generator=draws).half() if biased else None
    labels = torch.randint(0, vocabulary, (tokens,), generator=draws)
    return tuple(None if tensor is None else tensor.to(DEVICE) for tensor in (states, weight, bias, labels))


def head_of(weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
    module = torch.nn.Identity()
    return Head(model=module, base=module, weight=weight, bias=bias, linear=True, output=None)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("processors", [1, 3])  # few leave the vocabulary whole, many split it
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [
        (64, 64, 256),  # whole tiles
        (130, 72, 300),  # ragged in all three
        (1, 33, 1000),  # rows that start at no multiple of 16 bytes
        (7, 16, 50),  # less than a tile
        (66, 96, 321),
    ],
)
def test_the_sum_and_the_labels_logits(tokens, hidden, vocabulary, processors, biased, monkeypatch) -> None:
    monkeypatch.setattr(head_kernel, "_processors", lambda _device: processors)
    states, weight, bias, labels = draw(tokens, hidden, vocabulary, biased=biased)
    logits = states.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = head_kernel.logsumexp(states, weight, bias, tile=SMALL)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), logits.logsumexp(dim=1), rtol=0, atol=1e-5)
    found = head_kernel.label_logits(states, weight, bias, labels)
    torch.testing.assert_close(found.double(), logits.gather(1, labels[:, None])[:, 0], rtol=0, atol=1e-5)


def test_the_chosen_tile() -> None:
    states, weight, _, _ = draw(70, 40, 500, biased=False)
    exact = (states.double() @ weight.double().T).logsumexp(dim=1)
    torch.testing.assert_close(head_kernel.logsumexp(states, weight, None).double(), exact, rtol=0, atol=1e-5)


def test_matrices_whose_rows_are_not_contiguous() -> None:
    states, weight, _, labels = draw(20, 32, 100, biased=False)
    wide = torch.cat([states, states], dim=1)[:, :32]
    turned = weight.T.contiguous().T
    for kernel, more in ((head_kernel.logsumexp, ()), (head_kernel.label_logits, (labels,))):
        expected = kernel(states, weight, None, *more)
        assert torch.equal(kernel(wide, turned, None, *more), expected)


def test_no_tokens() -> None:
    states, weight, bias, labels = draw(0, 16, 50, biased=True)
    assert head_kernel.logsumexp(states, weight, bias).shape == (0,)
    assert head_kernel.label_logits(states, weight, bias, labels).shape == (0,)


def test_a_bias_of_minus_infinity_and_logits_far_from_zero() -> None:
    states, weight, bias, _ = draw(9, 32, 200, biased=True)
    bias[:150] = float("-inf")
    for factor in (1, 300):
        logits = (factor * states).double() @ weight.double().T + bias.double()
        found = head_kernel.logsumexp(factor * states, weight, bias, tile=SMALL).double()
        torch.testing.assert_close(found, logits.logsumexp(dim=1), rtol=1e-6, atol=1e-5)


def test_the_rounding_of_many_tiles_does_not_add_up() -> None:
    states, weight, _, _ = draw(4, 32, 6400, biased=False)
    states += weight[:4]  # maxima early, and the same ones over a hundred tiles
    exact = (states.double() @ weight.double().T).logsumexp(dim=1)
    found = head_kernel.logsumexp(states, weight, None, tile=SMALL)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_outputs_with_the_kernel_are_those_without(biased, monkeypatch) -> None:
    states, weight, bias, labels = draw(70, 32, 300, biased=biased)
    plain = Outputs(head_of(weight, bias), states, labels)
    monkeypatch.setattr(base, "head_kernel_for", lambda _factor: head_kernel)
    ours = replace(plain, compiled=True)
    torch.testing.assert_close(ours.logsumexp, plain.logsumexp, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.label_logit, plain.label_logit, rtol=0, atol=1e-5)
    assert "_head_pass" not in vars(ours)  # no logits were made
    itself = KL().losses(ours, KL().targets(ours))
    assert itself.abs().max() < 1e-4  # of one token; the mean row that KL keeps is fp16
    assert abs(float(itself.mean())) < 1e-5


def test_only_narrow_half_precision_on_cuda_goes_through_the_kernel() -> None:
    assert fused.head_kernel_for(torch.zeros(2, 16, dtype=torch.float16)) is None
    if DEVICE == "cuda":
        assert fused.head_kernel_for(torch.zeros(2, 16, device=DEVICE)) is None
        assert fused.head_kernel_for(torch.zeros(2, 4096, device=DEVICE, dtype=torch.float16)) is None
        assert fused.head_kernel_for(torch.zeros(2, 576, device=DEVICE, dtype=torch.float16)) is head_kernel
    assert rows_at_once(head_of(torch.zeros(50, 16), None), 9, compiled=True) == 1


def test_kernels_that_fail_are_replaced_with_a_warning(monkeypatch, caplog) -> None:
    find = fused._working_head_kernel.__wrapped__
    assert find(torch.device(DEVICE), torch.float16) is head_kernel
    right = head_kernel.logsumexp
    monkeypatch.setattr(head_kernel, "logsumexp", lambda *factors: right(*factors) + 1)
    assert find(torch.device(DEVICE), torch.float16) is None
    assert "Triton does not work here (ArithmeticError)" in caplog.text


def test_the_vocabulary_is_split_until_a_gpu_is_busy() -> None:
    split = head_kernel._splits
    assert split(1024, 192, block_bytes=147456, processors=132) == 2  # SmolLM2: many tokens, narrow
    assert split(256, 125, block_bytes=2**20, processors=132) == 8  # wide: fewer blocks at once stay in cache
    assert split(1, 192, block_bytes=147456, processors=132) == 128
    assert split(1, 3, block_bytes=1, processors=132) == 2
    assert split(0, 3, block_bytes=1, processors=132) >= 1
