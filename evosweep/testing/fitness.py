"""Requirements of a fitness."""

import math
from dataclasses import replace

import pytest
import torch

from evosweep.fitness import base
from evosweep.fitness.base import Fitness, Outputs
from evosweep.models.head import Head

VOCABULARY = 50
HIDDEN = 16
TOKENS = 9


def make_head(*, bias: bool) -> Head:
    """Return a linear head with random weights, shape (VOCABULARY, HIDDEN)."""
    draws = torch.Generator().manual_seed(9)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draws)
    offset = torch.randn(VOCABULARY, generator=draws) if bias else None
    nothing = torch.nn.Identity()
    return Head(model=nothing, base=nothing, weight=weight, bias=offset, linear=True, output=None)


class SoftCapped(Head):
    """A head whose logits are no linear function of the hidden state."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits between -5 and 5, shape (tokens, VOCABULARY)."""
        return 5 * torch.tanh((hidden @ self.weight.T) / 5)


def make_outputs(head: Head, *, seed: int, tokens: int = TOKENS) -> Outputs:
    """Return random final hidden states, shape (tokens, HIDDEN), and labels.

    Args:
        head: The head that they go through.
        seed: Of the random numbers.
        tokens: How many.
    """
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=draws)
    return Outputs(head, hidden, torch.randint(0, VOCABULARY, (tokens,), generator=draws))


class FitnessContract:
    """Test suite of fitnesses; subclass it and implement ``make``.

    Attributes:
        zero_for_dense: Whether the loss is a divergence: 0 for the dense model itself, positive for any other.
    """

    zero_for_dense = True

    def make(self) -> Fitness:
        """Return the fitness."""
        raise NotImplementedError

    @pytest.fixture(params=["linear", "with a bias", "soft-capped"])
    def head(self, request: pytest.FixtureRequest) -> Head:
        """Return an output head of each kind."""
        head = make_head(bias=request.param == "with a bias")
        return SoftCapped(**{**vars(head), "linear": False}) if request.param == "soft-capped" else head

    @pytest.fixture
    def dense(self, head: Head) -> Outputs:
        """Return outputs of a model that plays the dense one."""
        return make_outputs(head, seed=0)

    @pytest.fixture
    def compressed(self, head: Head, dense: Outputs) -> Outputs:
        """Return outputs of another model for the same labels."""
        return replace(make_outputs(head, seed=1), labels=dense.labels)

    def losses(self, outputs: Outputs, dense: Outputs) -> torch.Tensor:
        """Return the loss of every token, shape (tokens,)."""
        fitness = self.make()
        return fitness.losses(outputs, fitness.targets(dense))

    def test_the_name_can_be_a_metric(self) -> None:
        """Trackers accept letters, digits and underscores everywhere."""
        assert self.make().name.isidentifier()

    def test_losses_are_one_finite_float_per_token(self, compressed: Outputs, dense: Outputs) -> None:
        """Sums over millions of tokens need single precision."""
        losses = self.losses(compressed, dense)
        assert losses.shape == (TOKENS,) and losses.dtype is torch.float32
        assert torch.isfinite(losses).all()

    def test_extreme_logits_give_finite_losses(self, compressed: Outputs, dense: Outputs) -> None:
        """A broken candidate must be ranked last, not become NaN."""
        loud = replace(compressed, hidden=compressed.hidden * 1000)
        assert torch.isfinite(self.losses(loud, dense)).all()

    def test_targets_are_one_row_per_token(self, dense: Outputs) -> None:
        """The evaluator stores and slices targets by token."""
        assert all(len(target) == TOKENS for target in self.make().targets(dense).values())

    def test_losses_do_not_depend_on_later_tokens(self, compressed: Outputs, dense: Outputs) -> None:
        """A short look at a window gives the first losses of the long one."""
        fitness = self.make()
        targets = fitness.targets(dense)
        some = 4
        first = replace(compressed, hidden=compressed.hidden[:some], labels=compressed.labels[:some])
        alone = fitness.losses(first, {name: target[:some] for name, target in targets.items()})
        torch.testing.assert_close(alone, fitness.losses(compressed, targets)[:some], rtol=1e-5, atol=1e-5)

    def test_losses_do_not_depend_on_chunks(
        self, compressed: Outputs, dense: Outputs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Logits are made in chunks that fit into memory; their size changes with the machine."""
        whole = self.losses(compressed, dense)
        monkeypatch.setitem(base.CHUNK_BYTES, "cpu", 2 * 4 * VOCABULARY)  # two tokens
        monkeypatch.setitem(base.PIECE_BYTES, "cpu", 7 * 4 * TOKENS)  # seven entries of the vocabulary
        # Fresh outputs: they cache what a pass over the head found.
        torch.testing.assert_close(self.losses(replace(compressed), replace(dense)), whole, rtol=1e-5, atol=1e-5)

    def test_losses_repeat_themselves(self, compressed: Outputs, dense: Outputs) -> None:
        """A fitness has no state and no randomness."""
        assert torch.equal(self.losses(compressed, dense), self.losses(replace(compressed), replace(dense)))

    def test_the_dense_model_has_no_divergence_from_itself(self, compressed: Outputs, dense: Outputs) -> None:
        """A divergence is 0 for the model itself and positive for another."""
        if self.zero_for_dense:
            assert self.losses(replace(dense), dense).abs().max() < 1e-4
            assert self.losses(compressed, dense).min() > 1e-3

    def test_worse_means_higher(self, dense: Outputs) -> None:
        """Lower is better: noise on the hidden state raises the mean loss where the dense model is right."""
        right = replace(dense, labels=torch.cat([logits.argmax(dim=1) for _, logits in dense.logits()]))
        noise = make_outputs(dense.head, seed=2).hidden
        means = [
            self.losses(replace(right, hidden=dense.hidden + noise * scale), right).mean() for scale in (0, 0.3, 3)
        ]
        assert means[0] < means[1] < means[2]

    def test_inputs_are_left_as_they_were(self, compressed: Outputs, dense: Outputs) -> None:
        """Other fitnesses are computed from the same outputs and targets."""
        fitness = self.make()
        targets = fitness.targets(dense)
        before = {name: target.clone() for name, target in targets.items()}
        hidden = compressed.hidden.clone()
        fitness.losses(compressed, targets)
        assert torch.equal(compressed.hidden, hidden)
        assert all(torch.equal(before[name], target) for name, target in targets.items())

    def test_the_reported_figure_rises_with_the_mean(self) -> None:
        """The figure orders candidates as the mean loss does, and is never NaN."""
        reduce = self.make().reduce
        means = [0.0, 0.01, 1.0, 20.0]
        figures = [reduce(mean) for mean in means]
        assert figures == sorted(set(figures))
        assert not math.isnan(reduce(1e6)) and reduce(1e6) >= figures[-1]
