"""Percentiles of KL, flips and shifts of the right token's probability."""

import numpy as np
import pytest
import torch

from evosweep.evaluate.tails import TokenFigures, choices, tails, token_figures


def test_figures_are_those_of_logits(evaluator) -> None:
    split = evaluator.splits["validation"]
    genome = np.zeros(len(evaluator.store.units), dtype=np.int64)
    found = token_figures(evaluator, genome, choices(evaluator, None))
    assert found.kl.shape == found.flipped.shape == (len(split.windows), split.windows.shape[1] - 1)
    tokens = torch.from_numpy(split.windows[1])[None]
    dense = evaluator.logits(None, tokens)[:-1].double()
    mine = evaluator.logits(genome, tokens)[:-1].double()
    kl = (dense.softmax(1) * (dense.log_softmax(1) - mine.log_softmax(1))).sum(1)
    np.testing.assert_allclose(found.kl[1], kl.numpy(), atol=1e-4)
    np.testing.assert_array_equal(found.flipped[1], (dense.argmax(1) != mine.argmax(1)).numpy())
    right = tokens[0, 1:, None].long()
    shift = (mine.softmax(1).gather(1, right) - dense.softmax(1).gather(1, right))[:, 0]
    np.testing.assert_allclose(found.shift[1], shift.numpy(), atol=1e-6)


def figures(windows: int) -> TokenFigures:
    draws = np.random.Generator(np.random.PCG64(5))
    shape = (windows, 200)
    return TokenFigures(draws.exponential(size=shape), draws.random(shape) < 0.2, draws.normal(0, 0.1, shape))


def test_intervals_hold_what_is_true() -> None:
    found = tails(figures(64))
    truth = {
        "kl": 1.0,
        "kl_p50": np.log(2),
        "kl_p90": np.log(10),
        "kl_p99": np.log(100),
        "flips": 0.2,
        "rms_shift": 0.1,
    }
    for name, value in truth.items():
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        assert found[name]["low"] < value < found[name]["high"]
        assert found[name]["high"] - found[name]["low"] < 0.3 * max(value, 1)
    assert found == tails(figures(64))


def test_one_window_has_no_interval() -> None:
    found = tails(figures(1))
    assert set(found["flips"]) == {"value"} and found["kl_p99.9"]["value"] == pytest.approx(
        np.percentile(figures(1).kl, 99.9)
    )
