import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from evosweep.fitness import base
from evosweep.fitness.base import Outputs
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.fitness.topk_kl import TopKKL
from evosweep.models.head import Head


def outputs_of(head: Head, seed: int, tokens: int = 9) -> Outputs:
    draws = torch.Generator().manual_seed(seed)
    return Outputs(head, torch.randn(tokens, 16, generator=draws), torch.randint(0, 50, (tokens,), generator=draws))


def head_of(*, bias: bool, linear: bool = True) -> Head:
    draws = torch.Generator().manual_seed(9)
    weight = torch.randn(50, 16, generator=draws)
    return Head(
        model=torch.nn.Identity(),
        base=torch.nn.Identity(),
        weight=weight,
        bias=torch.randn(50, generator=draws) if bias else None,
        linear=linear,
        output=None,
    )


class SoftCapped(Head):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh((hidden @ self.weight.T) / 5)


@pytest.mark.parametrize("bias", [False, True])
def test_kl_is_the_plain_formula(bias: bool, monkeypatch) -> None:
    monkeypatch.setitem(base.CHUNK_BYTES, "cpu", 50 * 4 * 4)  # several chunks
    head = head_of(bias=bias)
    dense, ours = outputs_of(head, 0), outputs_of(head, 1)
    p, q = (head.logits(each.hidden).double().log_softmax(-1) for each in (dense, ours))
    expected = (p.exp() * (p - q)).sum(-1)
    losses = KL().losses(ours, KL().targets(dense))
    assert torch.allclose(losses.double(), expected, atol=1e-4)


def test_kl_remembers_hidden_size_not_vocabulary() -> None:
    dense = outputs_of(head_of(bias=False), 0)
    assert {name: tuple(value.shape) for name, value in KL().targets(dense).items()} == {
        "mean_row": (9, 16),
        "constant": (9,),
    }


def test_kl_with_a_soft_capped_head() -> None:
    plain = head_of(bias=False)
    head = SoftCapped(**{**vars(plain), "linear": False})
    dense, ours = outputs_of(head, 0), outputs_of(head, 1)
    p, q = (head.logits(each.hidden).double().log_softmax(-1) for each in (dense, ours))
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(KL().losses(ours, KL().targets(dense)).double(), expected, atol=1e-4)


def test_perplexity_is_the_exponential_of_cross_entropy() -> None:
    ours = outputs_of(head_of(bias=True), 3)
    expected = torch.nn.functional.cross_entropy(ours.head.logits(ours.hidden), ours.labels)
    losses = Perplexity().losses(ours, {})
    assert Perplexity().reduce(float(losses.mean())) == pytest.approx(math.exp(float(expected)), rel=1e-5)


def test_perplexity_beyond_numbers_is_infinite() -> None:
    assert Perplexity().reduce(1e6) == math.inf


def test_topk_kl_bounds_kl_from_below_and_meets_it_with_all_tokens() -> None:
    head = head_of(bias=True)
    dense, ours = outputs_of(head, 0), outputs_of(head, 1)
    exact = KL().losses(ours, KL().targets(dense))
    bounds = [TopKKL(k=k).losses(ours, TopKKL(k=k).targets(dense)) for k in (1, 8, 49, 1000)]
    for lower, higher in pairwise([*bounds, exact]):
        assert (lower <= higher + 1e-4).all()
    assert torch.allclose(bounds[-1], exact, atol=1e-3)
    assert TopKKL(k=8).losses(dense, TopKKL(k=8).targets(dense)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_dense_model_is_at_no_distance_from_itself_in_any_type(dtype: torch.dtype, bias: bool) -> None:
    """Logits of some 20, as models have them: rounded to bfloat16 they alone would be off by 0.06."""
    head = head_of(bias=bias)
    dense = outputs_of(head, 0)
    head = replace(head, weight=(5 * head.weight).to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
    dense = replace(dense, head=head, hidden=dense.hidden.to(dtype))
    assert dense.label_logit.dtype is torch.float32 and dense.logsumexp.abs().max() > 20
    assert KL().losses(dense, KL().targets(dense)).abs().max() < 2e-5


def test_half_precision_gives_the_formula_of_its_own_weights() -> None:
    head = head_of(bias=True)
    assert head.bias is not None
    head = replace(head, weight=head.weight.bfloat16(), bias=head.bias.bfloat16())
    dense, ours = (replace(outputs_of(head, seed), hidden=outputs_of(head, seed).hidden.bfloat16()) for seed in (0, 1))
    exact = [x.hidden.double() @ head.weight.double().T + head.bias.double() for x in (dense, ours)]
    p, q = (logits.log_softmax(-1) for logits in exact)
    losses = KL().losses(ours, KL().targets(dense)).double()
    assert torch.allclose(losses, (p.exp() * (p - q)).sum(-1), rtol=2e-3, atol=2e-3)
